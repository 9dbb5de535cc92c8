"""From run logs to tables, figures and one offline HTML file; never imports torch.

In reading order:

    columns.py         the numbers that tables show, and what each means
    methods.py         how a method looks: name, colours, mark, line
    parts.py           what a run's method is made of
    naming.py          what settings of one method are called
    estimates.py       runs → mean ± sd for each method and setting
    verdict.py         the sentence on top, by paired differences
    before_after.py    fine-tuning: where it began, where it ended
    cost.py            what the imbalance would cost under expert parallelism
    summary.py         all of it together: a section for each kind of micro-batch
    markdown.py        sections → Markdown tables
    configuration.py   what was run, in words
    loads.py           loads as a log has them
    pack.py            loads as bytes for the page
    frames.py          loads over steps, domains over layers, pairs of experts
    canvas.py          how every figure looks
    labels.py          where names stand next to marks
    draw.py            what is drawn
    embed.py           a figure as SVG for the page
    pictures.py        the pictures of the page
    figures.py         the figures for papers and for a README
    paper.py           figures → files
    page.py            everything → one HTML file (page.html.j2, script/, style/)
    live.py            the page while training
    watch.py           runs in the terminal
    diagnosis/         what is wrong with runs, and what to change
"""

from moebalance.report.before_after import BeforeAfter
from moebalance.report.markdown import write_markdown
from moebalance.report.page import write_report
from moebalance.report.paper import write_figure, write_figures
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
