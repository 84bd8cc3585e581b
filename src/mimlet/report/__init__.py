"""One self-contained HTML page about runs: pictures first, prose little."""

from mimlet.report.collect import write_report
from mimlet.report.figures import Curve, Picture, curves_svg, reconstruction_grid

__all__ = ["Curve", "Picture", "curves_svg", "reconstruction_grid", "write_report"]
