"""Add a trained network of the CIFAR-10 benchmark to the package, with a model card.

python tools/publish_model.py featnorm-reproduction/laptop/relu-512-42epochs-seed0 cifar10-resnet18
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from featnorm._utils.files import replacing
from featnorm.models import packaged
from featnorm.paper.images import CLASSES, load_images
from featnorm.paper.scoring import score
from featnorm.paper.studies.cifar10 import Variant, quick_detectors
from featnorm.paper.study import Context, studies
from featnorm.runtime import Runtime

CARD = """# {name}

A ResNet-18 for 32 x 32 images, of width {width}, with the paper's head: a hidden layer of {hidden} units, an
embedding of {embedding} and cosine logits at temperature {temperature}. `featnorm.load_model("{name}")` returns
it, for pixels in [0, 1].

It was trained by the benchmark of `featnorm reproduce table3` on {images}, from random
weights and without other data. The weights are stored in half precision; the results below were measured with
these weights.

- accuracy on {test}: {accuracy:.2%}
- {size:.1f} MB, {parameters:,} parameters
- license: that of featnorm; the training images are CIFAR-10 (Krizhevsky, 2009)

This is one of the benchmark's networks, meant for trying featnorm and for checking its results. It classifies
small photographs into ten classes and is not suitable for any other use.

{table}"""


def main() -> None:
    """Round the weights, evaluate them again, and write the file and its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument("name", help="name of the network in the package")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("FEATNORM_DATA"))
    arguments = parser.parse_args()
    result = json.loads((arguments.run / "result.json").read_text("utf-8"))
    variant = Variant(**result["variant"])
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in load_file(arguments.run / "model.safetensors").items()
    }
    model = variant.build(result["width"], 0)
    model.load_state_dict({key: value.to(model.state_dict()[key].dtype) for key, value in weights.items()})
    root = arguments.data_root and Path(arguments.data_root)
    context = Context("laptop", root, None, arguments.run.parent, Runtime(), result["environment"])
    # Detectors whose results can be checked in a minute.
    result |= score(model.eval(), load_images(root), quick_detectors(), context)
    head = model[2]
    network = {
        "width": result["width"],
        "classes": CLASSES,
        "hidden": variant.hidden,
        "embedding": head.embedding.out_features,
        "activation": variant.activation,
        "temperature": head.classifier.temperature,
        "mean": model[0].mean.flatten().tolist(),
        "std": model[0].std.flatten().tolist(),
    }
    folder = Path(packaged.__file__).parent
    file = folder / f"{arguments.name}.safetensors"
    with replacing(file) as temporary:
        save_file(weights, temporary, {"featnorm": json.dumps({"network": network, "result": result})})
    card = CARD.format(
        name=arguments.name,
        **network,
        images=result["images"]["training images"] + " images",
        test=result["images"]["in-distribution"] + " images",
        accuracy=result["accuracy"],
        size=file.stat().st_size / 1e6,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        table=studies()["table3"].tables([result])["table3"].markdown(),
    )
    file.with_suffix(".md").write_text(card, encoding="utf-8")
    assert torch.equal(model[2].hidden.weight, packaged.load_model(arguments.name)[2].hidden.weight)


if __name__ == "__main__":
    main()
