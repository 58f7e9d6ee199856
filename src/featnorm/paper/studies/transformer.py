"""A vision transformer trained on CIFAR-10 from scratch, with the paper's head."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from featnorm.paper.images import CLASSES, Images, cifar10_images
from featnorm.paper.networks import cifar_transformer
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.scoring import compared_detectors, train_and_score
from featnorm.paper.study import Context, Seeded, Study
from featnorm.paper.tables import MEASURES, Result, Table, facts, left_out, ranked


@dataclass(frozen=True)
class Scale:
    """Sizes of the transformer (see `cifar_transformer`), settings of its training, and number of seeds."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    recipe: PaperRecipe
    seeds: int
    hidden: int = 512

    def build(self, seed: int) -> nn.Sequential:
        """Return the network, for pixels in [0, 1], with the initial weights of a seed."""
        sizes = {name: getattr(self, name) for name in ("width", "depth", "heads", "mlp_ratio", "hidden")}
        return cifar_transformer(len(CLASSES), **sizes, seed=seed)


# AdamW as usual for transformers; by estimate, 35 minutes of one CPU core in bfloat16.
_RECIPE = PaperRecipe(
    epochs=18,
    batch_size=128,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.05,
    warmup=0.1,
    augment=True,
    crop=24,
)
SCALES = {
    "laptop": Scale(128, 6, 2, 2.0, _RECIPE, seeds=1),
    "paper": Scale(
        192, 12, 3, 4.0, PaperRecipe(200, 512, "adamw", 1e-3, weight_decay=0.05, warmup=0.1, augment=True), seeds=3
    ),
}


@dataclass(frozen=True, eq=False)
class TransformerStudy(Study[Scale, Images, Seeded]):
    """Transformers by seed; its result has one entry for each, see `featnorm.paper.scoring.train_and_score`."""

    page: ClassVar[str] = "norms"
    scales: ClassVar[Mapping[str, Scale]] = SCALES

    def load(self, scale: Scale, context: Context) -> Images:
        return context.once(cifar10_images)

    def jobs(self, scale: Scale, inputs: Images) -> list[Seeded]:
        return [Seeded(self.name, seed) for seed in range(scale.seeds)]

    def settings(self, job: Seeded, scale: Scale, inputs: Images) -> dict[str, Any]:
        sizes = {name: value for name, value in asdict(scale).items() if name not in ("recipe", "seeds")}
        return {"network": sizes, "recipe": scale.recipe.to_dict(), "seed": job.seed, "images": inputs.facts}

    def run(self, job: Seeded, scale: Scale, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        model, detectors = scale.build(job.seed), compared_detectors()
        return train_and_score(model, inputs, detectors, scale.recipe, job.seed, folder, context)

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        headers, rows = ranked(content, {})
        accuracy = ", ".join(f"{100 * result['accuracy']:.1f}" for result in content)
        notes = [
            f"networks: {len(content)}; accuracy on ID {accuracy} %",
            f"network: {content[0]['network']}; recipe: {content[0]['recipe']}",
            *facts(content),
            *left_out(content[0]),
        ]
        rows = [[name, mean, *sets] for name, mean, _, *sets in rows]
        return {self.name: Table(f"{self.title}: {MEASURES}", ["Detector", "Mean", *headers[3:]], rows, notes)}


TransformerStudy("transformer", "A vision transformer on CIFAR-10")
