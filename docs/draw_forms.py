"""Draws `forms.svg`, the two forms of a DoRA layer: `python docs/draw_forms.py`."""

from pathlib import Path

TENSOR, GEMM, KERNEL = "#ffffff", "#dbe7f6", "#fbe3c0"
STYLE = "text{font:13px sans-serif;fill:#222;text-anchor:middle} .left{text-anchor:start} .title{font-weight:bold}"


def box(x: int, y: int, width: int, text: str, fill: str) -> str:
    """A box of one or two lines, its left edge at `x` and its middle at `y`."""
    lines = text.split("\n")
    height = 12 + 17 * len(lines)
    shape = (
        f'<rect x="{x}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="#555"/>'
    )
    first = y + 4.5 - 8.5 * (len(lines) - 1)
    words = (f'<text x="{x + width / 2:g}" y="{first + 17 * row:g}">{line}</text>' for row, line in enumerate(lines))
    return shape + "".join(words)


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    """An arrow from the first point to the second."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#555" marker-end="url(#tip)"/>'


def title(x: int, y: int, text: str) -> str:
    return f'<text class="left title" x="{x}" y="{y}">{text}</text>'


TOKEN_SPACE = [
    title(20, 26, "Token space: few tokens"),
    box(20, 75, 90, "x  [M, K]", TENSOR),
    box(160, 55, 150, "z = x Wᵀ", GEMM),
    box(160, 95, 150, "h = x Aᵀ", GEMM),
    box(20, 140, 90, "W, A, B, m", TENSOR),
    box(160, 140, 150, "g = m / ‖W + s B A‖", KERNEL),
    box(370, 95, 190, "y = g ⊙ (z + s h Bᵀ) + b\none pass over the output", KERNEL),
    box(620, 95, 90, "y  [M, N]", TENSOR),
    arrow(110, 75, 158, 57),
    arrow(110, 75, 158, 93),
    arrow(110, 140, 158, 140),
    arrow(310, 55, 368, 84),
    arrow(310, 95, 368, 95),
    arrow(310, 140, 368, 108),
    arrow(560, 95, 618, 95),
]
WEIGHT_SPACE = [
    title(20, 206, "Weight space: many tokens"),
    box(20, 245, 90, "W, A, B, m", TENSOR),
    box(160, 245, 240, "W′ = g ⊙ (W + s B A)\nnorm and merge over the weight", KERNEL),
    box(20, 300, 90, "x  [M, K]", TENSOR),
    box(450, 272, 110, "y = x W′ᵀ + b", GEMM),
    box(620, 272, 90, "y  [M, N]", TENSOR),
    arrow(110, 245, 158, 245),
    arrow(400, 245, 448, 266),
    arrow(110, 300, 448, 278),
    arrow(560, 272, 618, 272),
]
LEGEND = [
    box(20, 345, 90, "cuBLAS", GEMM),
    box(120, 345, 90, "Triton", KERNEL),
    '<text class="left" x="225" y="349.5">W′ is transient: nothing of its size is kept for the backward pass.</text>',
]


def draw() -> str:
    """The drawing as SVG text."""
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#555"/></marker>'
    )
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 730 370" role="img">',
        "<title>The two forms of a DoRA layer: token space and weight space</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{tip}</defs>",
        '<rect width="730" height="370" fill="#fafafa"/>',
        *TOKEN_SPACE,
        *WEIGHT_SPACE,
        *LEGEND,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("forms.svg").write_text(draw(), encoding="utf-8")
