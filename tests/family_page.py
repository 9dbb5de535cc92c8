"""The page `docs/families.md`: every family under the installed Transformers, and older ones.

    python tests/family_page.py                   # examine every family, and write the page
    python tests/family_page.py mixtral jamba     # print the rows of these
    python tests/family_page.py --count           # under another release: write how many hold

The last one leaves a file in `evidence/results/families/`, from which the page's tables of other
releases come.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import moebalance as mb
from families import COMMON, FAMILIES, tiny
from family_checks import Row, examine, phi
from family_configs import NEWER_FAMILIES

ROOT = Path(__file__).parents[1]
PAGE, COUNTS = ROOT / "docs" / "families.md", ROOT / "evidence" / "results" / "families"


class Count(NamedTuple):
    """How the families that one release of Transformers has fared, `brief`ly examined.

    Attributes:
        transformers: the release.
        kept: families that kept every promise, refusals by name not among them.
        refused: what `attach` said of those that it refused for a router's sake.
        without_router: families that it refused because it found no router.
        failed: the first check that each of the rest did not pass.
        newer: whole rows of families that the release of the page does not have.
    """

    transformers: str
    kept: list[str]
    refused: dict[str, str]
    without_router: list[str]
    failed: dict[str, str]
    newer: list[list[str]] = []  # noqa: RUF012

    @property
    def built(self) -> int:
        """Families that the release can build."""
        return sum(map(len, self[1:5]))

    def __str__(self) -> str:
        return f"transformers {self.transformers}: built {self.built}, kept {len(self.kept)}"


def count() -> Count:
    """Examine every family that the installed Transformers can build."""
    newer = [list(examine(family)) for family in NEWER_FAMILIES if family in FAMILIES]
    found = Count(transformers.__version__, [], {}, [], {}, newer)
    for family in FAMILIES:
        try:
            model = tiny(family)
        except _ERRORS:
            continue
        try:
            if not mb.huggingface.find_sites(model):
                found.without_router.append(family)
                continue
            mb.attach(model, phi(family))
        except ValueError as refusal:
            found.refused[family] = str(refusal).partition(". ")[0]
            continue
        try:
            examine(family, brief=True)
        except _ERRORS as error:
            reason = str(error).strip().partition("\n")[0]
            found.failed[family] = f"{type(error).__name__}: {reason}"
        else:
            found.kept.append(family)
    return found


# What a model of another release may raise on settings that it does not know, or as it runs.
_ERRORS = (AssertionError, AttributeError, ImportError, LookupError, OSError)
_ERRORS += (RuntimeError, StrictDataclassError, TypeError, ValueError)


def committed_counts() -> list[Count]:
    """Counts under other releases, the newest first."""
    found = [Count(**json.loads(path.read_text("utf-8"))) for path in COUNTS.glob("*.json")]
    return sorted(found, key=lambda c: [int(n) for n in c.transformers.split(".")], reverse=True)


def newer_families() -> str:
    """The rows of families that came later than the release of the page."""
    return "\n".join(str(Row(*row)) for each in committed_counts() for row in each.newer)


def other_releases() -> str:
    """The page's table of them."""
    return "\n".join(
        f"| {each.transformers} | {each.built} | {len(each.kept)} | {len(each.refused)} "
        f"| {len(each.without_router)} | {', '.join(each.failed) or '–'} |"
        for each in committed_counts()
    )


def committed_rows() -> dict[str, Row]:
    """The lines of the tables of families, by family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    rows = {name: (name, *rest) for name, *rest in cells}
    return {family: Row(*rows[family]) for family in FAMILIES}


def page(rows: dict[str, Row]) -> str:
    """The whole page around the rows of its first table."""
    return _TEXT.format(
        version=transformers.__version__,
        header="| " + " | ".join(field.replace("_", " ") for field in Row._fields) + " |",
        rule="|".join(["---"] * len(Row._fields)),
        rows="\n".join(str(row) for family, row in rows.items() if family not in NEWER_FAMILIES),
        newer=newer_families(),
        other=other_releases(),
        common=len(COMMON),
        families=len(rows),
        without=sum(row.resumes == "without experts" for row in rows.values()),
    )


_TEXT = """# Families of Transformers {version}

Can you balance your model, and by which lever? Find its family in the table. `make test` checks
every row, on a tiny model with random weights; `python tests/family_page.py` writes this page from
those checks. The columns:

- **found**: MoE routers found, out of the routers in the model. Their experts and K are checked
  too.
- **loss lever**: the gradient that `attach` adds equals the gradient of the explicit term, on every
  parameter of every router. Counts and scores equal a recomputation from the router's own output,
  without padding. After `detach` the outputs are bit-identical.
- **selection lever**: a [price](glossary.md#price) changes which experts are chosen, and their
  weights still come from their affinities alone. *native*: moebalance writes −price into the
  model's own selection bias, which is saved with the model. *hook*: experts are chosen again after
  the router; the handle holds the price.
- **checkpointing**: counted once and charged alike, reentrant or not.
- **compile**: counted once and charged alike with the whole model under Dynamo. The only graph
  breaks are the model's own. `make test` compiles the whole model of the {common} families that
  most people train, and the MoE blocks of the others. The script compiles all of them whole.
- **resumes**: how much a Transformers Trainer that resumes restores, with or without moebalance.
  *without experts*, in {without} of {families} families: `save_pretrained` renames the experts, and
  the Trainer does not undo this, so the model keeps its own experts. Load the model with
  `from_pretrained` before you resume ([doctor.md](doctor.md#findings)).

{header}
|{rule}|
{rows}

## Families of Transformers 5.24

They are examined under that release, and not by `make test`. A looped layer of Inkling 2 calls its
router once a pass: each pass is counted, and charged as a layer of its own would be. *In part*: the
Trainer passes over other renamed weights than the experts.

{header}
|{rule}|
{newer}

## A family that is not here

It works if its routers return `(logits, weights, experts)` and weigh by softmax, sigmoid or
√softplus. moebalance finds this out by running the router, not from its name. Other routers are
refused by name.

## Other releases of Transformers

The same checks with other releases, without *compile* and *resumes*, by
`python tests/family_page.py --count`. Names and reasons are in `evidence/results/families/`.
[Clients](clients.md#releases-of-transformers) has more tests under the releases that clients pin.

| release | of these it builds | every promise kept | router refused | no router | not judged |
|---|---|---|---|---|---|
{other}

`attach` refuses a model without a router, or with a router of unknown kind. Four could not be
judged, with or without moebalance: Llama 4 with its vision tower does not run with 5.24, Mistral
Large 4 does not with 5.24 and reentrant checkpointing, DBRX does not run with 5.6 and before, and
ERNIE 4.5 starts with a gate of zeros with 5.16. Before 5.6, softmax families return probabilities
instead of logits, so that another softmax would be the second one. moebalance notices this by
running the router. Transformers 4 is not supported.
"""


def write_count() -> None:
    """Count under the installed Transformers, and write it down."""
    found = count()
    COUNTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found._asdict(), indent=1, ensure_ascii=False)
    (COUNTS / f"{found.transformers}.json").write_text(f"{text}\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--count"]:
        write_count()
    elif sys.argv[1:]:
        for name in sys.argv[1:]:
            print(examine(name))
    else:
        PAGE.write_text(page({name: examine(name) for name in FAMILIES}), encoding="utf-8")
