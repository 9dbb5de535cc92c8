"""Evidence: every claim about φ-balancing, and ours, held against training runs of its own.

    recipes/*.toml ──compare──▶ run logs ──keep──▶ results/ ──chapters──▶ docs/evidence.md

What is kept in `results/` is all that the pages read. You can write the pages again, and check
them, without training anything. It runs in a clone of the repository only:

    __main__.py    the command `python -m evidence`
    pages.py       results → docs/evidence.md and the other pages of numbers in docs/
    chapters/      one claim a file: the rule of its verdict, its tables, its figures
    chapter.py     what a chapter consists of; words and tables that chapters share
    figures.py     what their figures share
    study.py       the results of one recipe: a line about all runs, then a line a run
    keep.py        run logs → results
    aims.py        how far loads are from given proportions, or from equal groups
    choose.py      the rule that chooses a setting; the grid of loss methods
    population.py  the bias of φ of a batch, drawn from simulated or trained scores
    corpora.py     fetches the text of seven domains; needs nothing but pip
    recipes/       one TOML file a study; checkpoints/ has the models that a study starts from
    results/       NAME.jsonl from the study of a recipe, or NAME/ with the run logs themselves
"""
