"""Formulas as MathML: readers need no script and no network for them."""

from docutils import nodes
from latex2mathml.converter import convert


def _mathml(formula, **options):
    # As fences, the bars of a norm are drawn in other heights with and without a subscript.
    return convert(formula, **options).replace("<mo>&#x02016;</mo>", "<mi>&#x02016;</mi>")


def _inline(writer, node):
    writer.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer, node):
    writer.body.append(_mathml(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app):
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
