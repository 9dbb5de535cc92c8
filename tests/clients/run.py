"""Train a tiny model in each client and write docs/clients.md: `python tests/clients/run.py`.

`make clients` builds the environments and runs this. Each run is a process of its own in the
client's environment; `spy.py` watches it. Names of clients choose some of them, and the rest of the
page stays as it was recorded in records.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS, PAGE = ROOT / ".venv-clients", ROOT / "docs" / "clients.md"
RECORDS = HERE / "records.json"
LIMIT_S = 600
"""How long one run may take; most take half a minute."""
CLIENTS = {"llamafactory": "LLaMA-Factory", "swift": "ms-swift", "axolotl": "axolotl"}
PACKAGES = {"llamafactory": "llamafactory", "swift": "ms-swift", "axolotl": "axolotl"}
SITUATIONS = {
    "llamafactory": (
        ("packing", "SFT, `packing: true`"),
        ("neat packing", "SFT, `neat_packing: true`"),
        ("partly frozen", "SFT, `finetuning_type: freeze`, the last of 2 layers"),
        ("LoRA + DPO", "LoRA + DPO, `additional_target: gate`"),
        ("LoRA + DPO, router frozen", "LoRA + DPO, routers frozen"),
    ),
    "swift": (
        ("packing", "SFT, `--packing true` (sdpa under the name of flash attention)"),
        ("padding-free", "SFT, `--padding_free true` (the same)"),
        ("partly frozen", "SFT, `--freeze_parameters model.layers.0`"),
        ("LoRA + DPO", "LoRA + DPO, `--modules_to_save gate`"),
        ("LoRA + DPO, router frozen", "LoRA + DPO, routers frozen"),
    ),
    "axolotl": (
        ("packing", "SFT, `sample_packing: true`"),
        ("partly frozen", "SFT, `unfrozen_parameters`: the last of 2 layers"),
        ("LoRA + DPO", "LoRA + DPO, `lora_modules_to_save: [gate]`"),
        ("LoRA + DPO, router frozen", "LoRA + DPO, routers frozen"),
    ),
}
# ruff: noqa: E501
HEAD = """\
# Clients: real runs

Do LLaMA-Factory, ms-swift and axolotl train balanced here, in their released versions? `make clients`
runs them and writes this page. Each row is one epoch on 16 conversations: a random Qwen3-MoE of 2
layers and 8 experts, φ-balancing attached as [entry points](integrations.md) says, on a CPU. It is
not part of `make test`.

- **Tokens** per layer: what the balancing counted, and by hand. By hand is every token of a training
  forward that is not the padding token, which is in no text. A reference policy's forwards do not
  count. **Places** has the padding too.
- **Routers**: balanced and frozen, of 2.
- **Loss** is the last one logged. All logged losses were finite, and `moe/maxvio` was in the log.

| client | release | Transformers | situation | outcome | steps | tokens | by hand | places | routers | loss |
|---|---|---|---|---|---:|---:|---:|---:|---|---:|
"""
FOOT = """
ms-swift packs under flash attention only, which needs a GPU. In its packed rows another attention
answers to that name; what is packed and what is counted is the same. LLaMA-Factory imports
torchaudio, for which an empty module stands in.

## Releases of Transformers

A few checks under the Transformers that each client pins, with the rest of its pins, and under the
newest release. **Accumulation**: a term is the same in one and in four micro-batches. **Padding**:
a Trainer's padding is not counted. **Resuming**: a run that is cut ends with the state of one that
is not. **Export**: a trained selection price is in the saved weights. [Families](families.md) says
which models each release balances.

| Transformers | pinned by | accumulation | padding | resuming | export |
|---|---|---|---|---|---|
"""


def train(client: str, situation: str) -> dict[str, Any]:
    """Run one situation in the client's environment and return what was seen."""
    place = ENVIRONMENTS / client
    with tempfile.TemporaryDirectory() as name:
        folder, record = Path(name), Path(name) / "record.json"
        environment = {
            **os.environ,
            "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", HERE, folder))),
            "CLIENT_RECORD": str(record),
            "HF_HUB_OFFLINE": "1",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
        }
        python = str(place / "bin" / "python")
        make = "import sys, tiny; tiny.save(tiny.Path(sys.argv[1]))"
        options: dict[str, Any] = {"env": environment, "cwd": folder, "text": True}
        subprocess.run([python, "-c", make, name], check=True, capture_output=True, **options)
        run = [python, str(HERE / f"{client}_runs.py"), situation, name]
        try:
            done = subprocess.run(
                run,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                **options,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"TimeoutError: no end within {LIMIT_S} s on a CPU"}
        if record.exists() and not done.returncode:
            return dict(json.loads(record.read_text("utf-8")))
    errors = [line for line in done.stdout.splitlines() if "Error: " in line and line[0] != " "]
    if not errors:
        raise RuntimeError(f"{client}, {situation}: {done.stdout[-3000:]}")
    return {"error": errors[-1]}


def releases(client: str) -> dict[str, str]:
    """The releases of the client and of Transformers."""
    (packages,) = (ENVIRONMENTS / client).glob("lib/python*/site-packages")
    found = {
        each.name.lower().replace("_", "-"): each.version
        for each in distributions(path=[str(packages)])
    }
    return {"release": found[PACKAGES[client]], "transformers": found["transformers"]}


def outcome(seen: dict[str, Any]) -> str:
    """Works, or why not, in a few words."""
    if "error" in seen:
        text = seen["error"].partition("Error: ")[2]
        if "works through the gradient of the router" in text:
            return "refused: the routers are frozen"
        return f"does not run: {text[:120]}"
    if seen["counted"] != seen["by_hand"]:
        return f"counts {seen['counted'] - seen['by_hand']:+d} tokens"
    if not (seen["finite"] and seen["logged"]):
        return "runs, and a loss is not finite or no metric is logged"
    return "works"


def release_table() -> str:
    """What `releases.py` found, the newest release first."""
    found = json.loads((HERE / "releases.json").read_text("utf-8"))
    lines = []
    for place, seen in found.items():
        by = {"here": "moebalance itself", "newest": "nobody yet"} | CLIENTS
        release, outcomes = seen["transformers"], seen["found"].values()
        number = [int(part) for part in release.split(".")]
        lines.append((number, f"| {release} | {by[place]} | {' | '.join(outcomes)} |\n"))
    return "".join(line for _, line in sorted(lines, reverse=True))


def page(records: dict[str, Any]) -> str:
    """The page, from the records of all clients and releases."""
    lines = []
    for client, title in CLIENTS.items():
        held = records.get(client, {"seen": {}})
        for key, what in SITUATIONS[client]:
            seen = held["seen"].get(key)
            if seen is None:
                continue
            numbers = ["–"] * 6
            if "error" not in seen:
                counts = (seen[name] for name in ("steps", "counted", "by_hand", "places"))
                routers = f"{seen['balanced']} balanced, {seen['frozen']} frozen"
                numbers = [*map(str, counts), routers, f"{seen['loss']:.3f}"]
            cells = [title, held["release"], held["transformers"], what, outcome(seen), *numbers]
            lines.append(f"| {' | '.join(cells)} |\n")
    return f"{HEAD}{''.join(lines)}{FOOT}{release_table()}"


def write_page() -> None:
    """Write the page from what was recorded."""
    PAGE.write_text(page(json.loads(RECORDS.read_text("utf-8"))), encoding="utf-8")


def main(clients: list[str]) -> None:
    """Run these clients, keep their records and write the page."""
    records = json.loads(RECORDS.read_text("utf-8")) if RECORDS.exists() else {}
    for client in clients:
        seen = {}
        for situation, _ in SITUATIONS[client]:
            seen[situation] = train(client, situation)
            print(f"{client}, {situation}: {outcome(seen[situation])}", flush=True)
        records[client] = {**releases(client), "seen": seen}
        RECORDS.write_text(f"{json.dumps(records, indent=1)}\n", encoding="utf-8")
    write_page()


if __name__ == "__main__":
    main(sys.argv[1:] or list(CLIENTS))
