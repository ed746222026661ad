"""Draw the README's picture, `docs/tradeoff.png`, from the tracked tables, and print what is left out of it and why.

`python benchmarks/tradeoff.py`; the pipeline draws the same from the tables it has just made (`reports/figures`).
"""

from matplotlib import style

from splitlab import ROOT, load_base, load_params
from splitlab.report.figures.run_figures import STYLE, save_figure
from splitlab.report.figures.tradeoff_figures import draw_tradeoff
from splitlab.study.tradeoff import tradeoff


def main():
    base = load_base(load_params()["base"]["source"])
    points = tradeoff(ROOT / "reports/metrics", alphas_cumprod=base.alphas_cumprod)
    with style.context(["default", STYLE]):
        print(save_figure(draw_tradeoff(points), ROOT / "docs/tradeoff.png"))
    for _, row in points[points["left_out"].ne("")].iterrows():
        print(f"left out: {row['scheme']}, {row['setting']}, {row['dataset']}: {row['left_out']}")


if __name__ == "__main__":
    main()
