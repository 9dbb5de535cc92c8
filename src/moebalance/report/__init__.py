"""From run logs to tables, figures and one offline HTML file; never imports torch."""

from moebalance.report.before_after import BeforeAfter
from moebalance.report.figure import write_figure
from moebalance.report.markdown import write_markdown
from moebalance.report.page import write_report
from moebalance.report.paper import write_figures
from moebalance.report.summary import Section, summarise, summary_rows

__all__ = [
    "BeforeAfter",
    "Section",
    "summarise",
    "summary_rows",
    "write_figure",
    "write_figures",
    "write_markdown",
    "write_report",
]
