"""One self-contained HTML page about runs and analyses: pictures first, prose little."""

from mimlet.report.collect import write_analysis, write_report
from mimlet.report.figures import Curve, Picture, curves_svg, film, image_grid

__all__ = ["Curve", "Picture", "curves_svg", "film", "image_grid", "write_analysis", "write_report"]
