"""The page `docs/families.md`: every family under the installed Transformers, and older ones.

    python tests/family_page.py                   # examine every family, and write the page
    python tests/family_page.py mixtral jamba     # print the rows of these
    python tests/family_page.py --count           # under an older release: write how many hold

The last one leaves a file in `benchmarks/results/families/`, from which the page's table of older
releases comes.
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
from families import FAMILIES, tiny
from family_checks import Row, examine, phi
from moebalance.integrations.huggingface import find_sites

ROOT = Path(__file__).parents[1]
PAGE, COUNTS = ROOT / "docs" / "families.md", ROOT / "benchmarks" / "results" / "families"


class Count(NamedTuple):
    """How the families that one release of Transformers has fared, `brief`ly examined.

    Attributes:
        transformers: the release.
        kept: families that kept every promise, refusals by name not among them.
        refused: what `attach` said of those that it refused for a router's sake.
        without_router: families that it refused because it found no router.
        failed: the first check that each of the rest did not pass.
    """

    transformers: str
    kept: list[str]
    refused: dict[str, str]
    without_router: list[str]
    failed: dict[str, str]

    @property
    def built(self) -> int:
        """Families that the release can build."""
        return sum(map(len, self[1:]))

    def __str__(self) -> str:
        return f"transformers {self.transformers}: built {self.built}, kept {len(self.kept)}"


def count() -> Count:
    """Examine every family that the installed Transformers can build."""
    found = Count(transformers.__version__, [], {}, [], {})
    for family in FAMILIES:
        try:
            model = tiny(family)
        except _ERRORS:
            continue
        try:
            if not find_sites(model):
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
    """Counts under older releases, the newest first."""
    found = [Count(**json.loads(path.read_text("utf-8"))) for path in COUNTS.glob("*.json")]
    return sorted(found, key=lambda c: [int(n) for n in c.transformers.split(".")], reverse=True)


def older_releases() -> str:
    """The page's table of them."""
    return "\n".join(
        f"| {each.transformers} | {each.built} | {len(each.kept)} | {len(each.refused)} "
        f"| {len(each.without_router)} | {', '.join(each.failed) or '–'} |"
        for each in committed_counts()
    )


def committed_rows() -> dict[str, str]:
    """The first table's lines, by family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    return {family: rows[family] for family in FAMILIES}


def page(rows: dict[str, str]) -> str:
    """The whole page around the rows of its first table."""
    return _TEXT.format(
        version=transformers.__version__,
        header="| " + " | ".join(field.replace("_", " ") for field in Row._fields) + " |",
        rule="|".join(["---"] * len(Row._fields)),
        rows="\n".join(rows.values()),
        older=older_releases(),
        families=len(rows),
        without=sum("| without experts |" in row for row in rows.values()),
    )


_TEXT = """# Families of Transformers {version}

Made by `python tests/family_page.py`; `make test` checks every row anew, each on a tiny model
with random weights. What the columns say was asserted, not looked up:

- **found**: MoE routers found, of those that the model has, with their experts and K.
- **loss lever**: the gradient that `attach` injects equals that of the explicit term, on every
  parameter of every router; counts and scores equal a recomputation from the router's own output,
  padding left out; `detach` gives bit-identical outputs.
- **selection lever**: a price changes which experts are chosen, and the weights of those chosen are
  what their affinities alone give. *native*: −price is written into the model's own selection
  bias and is saved with it. *hook*: experts are chosen again after the router; the price is the
  handle's.
- **checkpointing**: reentrant and non-reentrant, counted once and charged alike.
- **compile**: the whole model under Dynamo, counted once and charged alike, with no graph break but
  the model's own.
- **resumes**: what a Transformers Trainer that resumes loads of the model, with moebalance or not.
  *without experts*, in {without} of {families} families: `save_pretrained` renames them, and
  the Trainer hands them to `load_state_dict` as they are: they stay as the model has them. Load the
  model with `from_pretrained` before resuming ([doctor.md](doctor.md#findings)).

{header}
|{rule}|
{rows}

## Older Transformers

The same checks under older releases (compiling and resuming left out), by
`python tests/family_page.py --count` in environments with these installed; reasons and names lie
in `benchmarks/results/families/`:

| release | of these it builds | every promise kept | router refused | no router | not judged |
|---|---|---|---|---|---|
{older}

`attach` refuses a model for a router of unknown kind, and one without any. Two could not be judged:
DBRX does not run under 5.6 and before, and ERNIE 4.5 starts with a gate of zeros under 5.16. Before
5.6 softmax families put probabilities in the logits' place (a softmax of them would be the second
one), which is noticed by running the router. Transformers 4 is not supported.

A family that is not here works if its routers return `(logits, weights, experts)` and weigh by
softmax, sigmoid or √softplus: that is found out by running the router, not by its name. Any other
is refused by name.
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
        PAGE.write_text(page({name: str(examine(name)) for name in FAMILIES}), encoding="utf-8")
