"""One look for every figure: a colour per method through the whole book, and words for each picture."""

import statistics

import matplotlib.pyplot as plt

# Okabe and Ito's palette, readable with colour-blind eyes, and greys for what is not PEFT.
# A method keeps its colour; within a family the hue is shared and the line style differs.
COLOURS = {
    "full": "#000000", "frozen": "#999999", "random": "#BBBBBB",
    "adapter": "#E69F00", "prefix": "#D55E00", "prompt": "#B5651D", "ia3": "#F0C27B",
    "bitfit": "#009E73", "fish": "#44AA99", "pafi": "#7FB069", "id3": "#117733",
    "lora": "#0072B2", "lora+": "#56B4E9", "adalora": "#332288", "dora": "#CC79A7",
    "qlora": "#88A9D8", "monteclora": "#882255",
}

STYLE = {
    "figure.figsize": (7.2, 3.8), "figure.dpi": 110, "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 2.0, "lines.markersize": 6,
    "image.cmap": "viridis",
}


def style() -> None:
    """Set the book's look; the first cell of every chapter calls it."""
    plt.rcParams.update(STYLE)


def describe(words: str) -> None:
    """Show the current figure and print what it says, for screen readers, captions and tests."""
    plt.show()
    print("Figure:", words)


def interval(values) -> tuple[float, float]:
    """(mean, half width of the 95 % t interval); the half width of one value is infinite."""
    from scipy.stats import t

    values = list(values)
    if len(values) < 2:
        return values[0], float("inf")
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def dots(ax, results: dict[str, list[float]], unit: str = "accuracy") -> None:
    """A row per name: every seed as a dot, the mean with its 95 % interval beside it."""
    for y, (name, values) in enumerate(reversed(results.items())):
        colour = COLOURS.get(name.split()[0].lower(), "#555555")
        mean, half = interval(values)
        ax.plot(values, [y + 0.16] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        ax.errorbar(mean, y - 0.08, xerr=half if half < 1e9 else None, fmt="D", color=colour, capsize=4)
    ax.set_yticks(range(len(results)), list(reversed(results)))
    ax.set_xlabel(unit)
    ax.grid(axis="y", visible=False)


def bars(ax, parts: dict[str, dict[str, float]], unit: str) -> None:
    """A stacked horizontal bar per name, its parts named in the legend, the sum at its end."""
    names = list(next(iter(parts.values())))
    shades = ["#4C566A", "#81A1C1", "#A3BE8C", "#D08770", "#EBCB8B"]
    for y, (_, row) in enumerate(reversed(parts.items())):
        left = 0.0
        for part, shade in zip(names, shades):
            ax.barh(y, row[part], left=left, color=shade, label=part if y == 0 else None)
            left += row[part]
        ax.text(left, y, f"  {left:,.3g}", va="center")
    ax.set_yticks(range(len(parts)), list(reversed(parts)))
    ax.set_xlabel(unit)
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1.0), fontsize=9)


MAP = {
    "additive": ("adapter", "prefix", "prompt", "ia3"),
    "selective": ("bitfit", "fish", "pafi", "id3"),
    "reparam": ("lora", "lora+", "adalora", "dora", "qlora", "monteclora"),
}


def taxonomy(lit: str | None = None) -> None:
    """The map of the book: three families, their methods, the one at hand lit."""
    fig, ax = plt.subplots(figsize=(7.2, 1.9))
    for y, (family, methods) in enumerate(reversed(MAP.items())):
        ax.text(-0.1, y, family, ha="right", va="center", fontweight="bold", fontsize=10)
        for x, name in enumerate(methods):
            on = lit is None or name == lit
            ax.text(x + 0.45, y, name, ha="center", va="center", fontsize=10,
                    color="white" if on else "#888888", fontweight="bold" if on else "normal",
                    bbox=dict(boxstyle="round,pad=0.35", facecolor=COLOURS[name] if on else "#F2F2F2",
                              edgecolor="none"))
    ax.set_xlim(-1.3, 6.1)
    ax.set_ylim(-0.6, 2.6)
    ax.axis("off")
    described = "; ".join(f"{family}: {', '.join(m)}" for family, m in MAP.items())
    describe(f"the map of the methods ({described})" + (f", with {lit} lit." if lit else "."))
