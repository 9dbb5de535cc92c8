"""Fine-tuning end to end, small: full and LoRA, before and after, resume, what it leaves."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moebalance as mb
from experiments import MODEL
from moebalance.lab.cli import app
from moebalance.lab.compare import compare, is_complete, plan
from moebalance.lab.evaluate import evaluate
from moebalance.lab.inputs import load_texts
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.lab.text.tokens import TOKENIZER_FILE
from moebalance.lab.train import train_run
from moebalance.lab.trainer import sample
from moebalance.runlog import LOG_NAME, Run, read_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    # PEFT's own, about names inside it and inside Transformers.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TRAIN = {"steps": 4, "batch_size": 2, "accumulation": 2, "eval_sequences": 6}
OLD, NEW = ["animals", "numbers"], ["verbs"]
WORDS = {
    "animals": "cat dog bird fish ",
    "numbers": "1 23 456 7890 ",
    "verbs": "run! go? sit, eat; ",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for domain, words in WORDS.items():
        (root / domain).mkdir()
        for part in range(5):
            (root / domain / f"{part}.txt").write_text(f"{part} {words * 150}")
    return root


@pytest.fixture(scope="module")
def pretrained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A finished run from scratch by method, each made once; its model lies beside its log."""
    made: dict[str, Run] = {}

    def make(method: str = "switch") -> Run:
        if method not in made:
            data = {"source": str(text), "domains": OLD, "seq_len": 32}
            recipe = Recipe.parse({"model": MODEL, "data": data, "train": TRAIN}, source="p.toml")
            folder = tmp_path_factory.mktemp("pretrained")
            made[method] = read_run(run(recipe, folder, method=method, save_model=True))
        return made[method]

    return make


@pytest.fixture(scope="module")
def table(text: Path, pretrained: Callable[..., Run]) -> dict[str, dict[str, object]]:
    """A fine-tuning recipe as TOML would give it."""
    return {
        "model": {"checkpoint": str(pretrained().path.parent / FINAL)},
        "data": {"source": str(text), "domains": NEW, "seq_len": 32},
        "old_data": {"source": str(text), "domains": OLD},
        "train": {**TRAIN, "learning_rate": 3e-3},
        "compare": {"methods": ["phi"], "seeds": [0]},
    }


def parse(table: dict[str, dict[str, object]], **changes: object) -> Recipe:
    """The recipe with keys of its tables changed: `model={"dtype": "bfloat16"}`, `lora={}`."""
    changed = {key: {**table.get(key, {}), **value} for key, value in changes.items()}
    return Recipe.parse({**table, **changed}, source="f.toml")


def run(recipe: Recipe, folder: Path, **changes: object) -> Path:
    settings = {"method": "phi", "seed": 0, "batching": "mixed", **changes}
    return train_run(recipe, folder=folder, **settings)


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses_of(model: torch.nn.Module, balancing: mb.Balancing, recipe: Recipe) -> list[float]:
    """On held-out text, and on text that it was trained on."""
    data, size = load_texts(recipe).data, recipe.train.eval_sequences
    texts = [sample(part, size) for part in (data.validation, data.train)]
    return [evaluate(model, balancing, text, batch_size=2)["loss"] for text in texts]


def without_times(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        # Churn is since the last evaluation of the process, of which a resumed one has none.
        {k: v for k, v in row.items() if k not in ("step_time_s", "wall_s", "churn")}
        for row in rows
        if row["kind"] != "end"
    ]


def test_before_and_after_are_measured_on_the_new_and_on_the_old_text(table, pretrained, tmp_path):
    log = read_run(run(parse(table), tmp_path))
    before, after = log.evals
    assert (before["step"], after["step"]) == (0, TRAIN["steps"])
    # Before the first step this is the pretrained model on the text of its own last evaluation.
    assert before["old_loss"] == pytest.approx(pretrained().evals[-1]["loss"], rel=1e-6)
    assert before["old_maxvio"] == pretrained().evals[-1]["maxvio"]
    assert after["loss"] < before["loss"]
    assert {"old_dead_experts", "old_mi", "dead_experts", "load"} <= after.keys()
    assert "mi" not in after  # one domain tells nothing of specialisation
    assert log.steps[0]["tokens"] == 2 * 2 * 32
    assert log.header["model"]["architecture"] == "qwen3_moe"
    assert log.header["model"]["trained_parameters"] == log.header["model"]["parameters"]
    assert log.header["data"]["domains"] == NEW
    assert log.header["data"]["old"]["domains"] == OLD


def test_the_final_model_loads_back_to_the_last_bit(table, tmp_path):
    recipe = parse(table, train={"save_every": TRAIN["steps"]})
    log = read_run(run(recipe, tmp_path, method="phi+loss-free", save_model=True))
    final = tmp_path / FINAL
    assert same(weights(final), weights(tmp_path / f"checkpoint-{TRAIN['steps']}"))
    model = AutoModelForCausalLM.from_pretrained(final)
    parts = mb.Together(mb.PhiBalancing(), mb.LossFree())
    balancing = mb.attach(model, parts)
    mb.huggingface.load(balancing, final)
    logged = [log.evals[-1][name] for name in ("loss", "seen_loss")]
    assert losses_of(model, balancing, recipe) == pytest.approx(logged, rel=1e-6)
    assert not list(tmp_path.glob("*.partial"))


def test_lora_trains_its_factors_and_the_routers_and_peft_loads_what_it_leaves(table, tmp_path):
    import peft

    recipe = parse(table, lora={"r": 2, "alpha": 4})
    log = read_run(run(recipe, tmp_path, save_model=True))
    assert 0 < log.header["model"]["trained_parameters"] < log.header["model"]["parameters"] / 4
    assert log.evals[-1]["loss"] < log.evals[0]["loss"]
    base = AutoModelForCausalLM.from_pretrained(recipe.checkpoint)
    routers = [layer.mlp.gate.weight.detach().clone() for layer in base.model.layers]
    model = peft.PeftModel.from_pretrained(base, tmp_path / FINAL)
    trained = [layer.mlp.gate.weight for layer in model.get_base_model().model.layers]
    assert not any(torch.equal(a, b) for a, b in zip(routers, trained, strict=True))
    balancing = mb.attach(model, mb.NoBalancing())
    logged = [log.evals[-1][name] for name in ("loss", "seen_loss")]
    assert losses_of(model, balancing, recipe) == pytest.approx(logged, rel=1e-6)
    names = weights(tmp_path / FINAL, "adapter_model")
    assert {name.split(".")[-2] for name in names} == {"lora_A", "lora_B", "gate"}


@pytest.mark.parametrize("lora", [None, {"r": 2, "dropout": 0.1}], ids=["full", "lora"])
def test_interrupted_and_resumed_fine_tuning_equals_uninterrupted(table, tmp_path, lora):
    changes = {"train": {"save_every": 2}} | ({"lora": lora} if lora else {})
    recipe = parse(table, **changes)
    whole = run(recipe, tmp_path / "whole", method="phi+loss-free", save_model=True)
    half = run(recipe, tmp_path / "half", method="phi+loss-free")
    lines = half.read_text().splitlines(keepends=True)
    half.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= 3)[:-9])
    shutil.rmtree(half.parent / "checkpoint-4")
    again = run(recipe, half.parent, method="phi+loss-free", save_model=True, resume=True)
    assert without_times(again) == without_times(whole)
    name = "adapter_model" if lora else "model"
    assert same(weights(half.parent / FINAL, name), weights(whole.parent / FINAL, name))


def test_a_run_is_not_resumed_from_another_checkpoint(table, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(str(table["model"]["checkpoint"]), origin)
    recipe = parse(table, model={"checkpoint": str(origin)}, train={"save_every": 2})
    run(recipe, tmp_path / "run")
    changed = weights(origin)
    changed["lm_head.weight"][0, 0] += 1
    save_file(changed, origin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"another run: content of the checkpoint: \w{8} → \w{8}\."
    ):
        run(recipe, tmp_path / "run", resume=True)


def test_a_frozen_router_is_refused_where_its_gradient_is_needed(table, tmp_path):
    recipe = parse(table, lora={"r": 2, "train_router": False})
    with pytest.raises(ValueError, match=r"SwitchLoss.*train_router = false leaves every router"):
        run(recipe, tmp_path, method="switch")
    with pytest.raises(ValueError, match="leaves every router frozen"):
        plan(recipe, tmp_path)
    assert not (tmp_path / LOG_NAME).exists()
    log = read_run(run(recipe, tmp_path, method="loss-free", save_model=True))
    assert log.steps[-1]["price_spread"] > 0
    assert not any("gate" in name for name in weights(tmp_path / FINAL, "adapter_model"))


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_the_balancing_state_beside_the_checkpoint_goes_on(
    table, pretrained, tmp_path, caplog, lora
):
    """Loss-free balancing's price belongs to the weights that were trained under it."""
    origin = pretrained("loss-free(speed=0.1)")
    changes = {"model": {"checkpoint": str(origin.path.parent / FINAL)}}
    recipe = parse(table, **changes, **({"lora": lora} if lora else {}))
    log = read_run(run(recipe, tmp_path / "same", method="loss-free(speed=0.1)"))
    assert log.evals[0]["old_loss"] == pytest.approx(origin.evals[-1]["loss"], rel=1e-6)
    assert not [record for record in caplog.records if "left aside" in record.message]
    if lora:
        return
    other = read_run(run(recipe, tmp_path / "other", method="phi"))
    assert other.evals[0]["old_maxvio"] != log.evals[0]["old_maxvio"]
    assert "left aside; this run starts anew" in caplog.text
    caplog.clear()
    run(parse(table), tmp_path / "stateless", method="phi")
    assert "left aside" not in caplog.text  # Switch leaves nothing that the weights are used to


def test_a_price_that_the_weights_cannot_hold_is_said_at_the_end(table, tmp_path, caplog):
    run(parse(table), tmp_path, method="loss-free(speed=0.1)", save_model=True)
    (said,) = [r.getMessage() for r in caplog.records if r.name.endswith("finetune")]
    assert said.startswith(f"{tmp_path / FINAL}: LossFree(")
    assert "speed=0.1" in said
    assert "do not hold it" in said


def test_the_checkpoints_own_tokeniser_reads_jsonl_and_leaves_with_the_model(
    table, pretrained, tmp_path
):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {
        w: i for i, w in enumerate(["<eos>", "<unk>", *["run!", "go?", "sit,", "eat;", "a", "b"]])
    }
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>")
    origin = tmp_path / "origin"
    shutil.copytree(pretrained().path.parent / FINAL, origin)
    (origin / TOKENIZER_FILE).unlink()
    own.save_pretrained(origin)
    rows = [{"text": f"a run! go? {'b ' * (i % 5)}" * 20} for i in range(60)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    small = {key: table[key] for key in ("train",)}
    data = {"source": str(source), "seq_len": 16}
    recipe = parse({**small, "model": {"checkpoint": str(origin)}, "data": data})
    texts = load_texts(recipe, cache_dir=tmp_path / "cache")
    ids = texts.data.train[0]["input_ids"].tolist()
    assert ids[:3] == [words["a"], words["run!"], words["go?"]]
    assert load_texts(recipe, cache_dir=tmp_path / "cache").data.sha256 == texts.data.sha256
    assert max(texts.data.train.tokens.flatten().tolist()) < len(words)
    assert 0 in texts.data.train.tokens  # documents are separated by the end of sequence
    log = read_run(run(recipe, tmp_path / "run", save_model=True))
    assert log.header["data"]["tokenizer"] == f"checkpoint-{len(words)}"
    assert (tmp_path / "run" / FINAL / "tokenizer.json").is_file()


def test_conversations_are_rendered_by_the_checkpoints_chat_template(table, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    known = ["<eos>", "<unk>", "<user>", "<assistant>", "hello", "there"]
    words = {word: number for number, word in enumerate(known)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    origin = tmp_path / "origin"
    shutil.copytree(str(table["model"]["checkpoint"]), origin)
    (origin / TOKENIZER_FILE).unlink()
    own.save_pretrained(origin)
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    source = tmp_path / "talks.jsonl"
    rows = [{"messages": talk * (1 + number)} for number in range(40)]
    source.write_text("\n".join(map(json.dumps, rows)))
    recipe = parse(
        {"model": {"checkpoint": str(origin)}},
        data={"source": str(source), "column": "messages", "seq_len": 16},
    )
    with pytest.raises(ValueError, match="Conversations need a chat template"):
        load_texts(recipe)
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    (origin / "chat_template.jinja").write_text(template)
    ids = load_texts(recipe).data.train[0]["input_ids"].tolist()
    assert ids[:4] == [words[word] for word in ("<user>", "hello", "<assistant>", "there")]
    with pytest.raises(ValueError, match="holds list, not text"):
        load_texts(replace(recipe, data=replace(recipe.data, tokenizer="bytes")))


def test_bytes_in_place_of_the_checkpoints_tokeniser_are_pointed_out(table, tmp_path, caplog):
    recipe = parse(table, data={"tokenizer": "bytes"})
    load_texts(recipe)
    assert not caplog.text  # the checkpoint was trained on bytes
    load_texts(parse(table, data={"tokenizer": "bpe", "vocab_size": 260}))
    assert "tokenizer='bpe' is used in place of the checkpoint's own" in caplog.text


def test_less_memory_and_lower_precision_change_little(table, tmp_path):
    plain = read_run(run(parse(table), tmp_path / "plain"))
    again = parse(table, train={"gradient_checkpointing": True})
    saving = read_run(run(again, tmp_path / "saving"))
    assert [row["loss"] for row in saving.steps] == pytest.approx(
        [row["loss"] for row in plain.steps], rel=1e-5
    )
    assert [row["tokens"] for row in saving.steps] == [row["tokens"] for row in plain.steps]
    half = read_run(run(parse(table, train={"bf16": True}), tmp_path / "half"))
    assert half.steps[-1]["loss"] == pytest.approx(plain.steps[-1]["loss"], rel=0.02)
    assert half.steps[-1]["loss"] != plain.steps[-1]["loss"]


@pytest.mark.usefixtures("forked")
def test_compare_fine_tunes_too_and_notices_another_checkpoint(table, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    origin = tmp_path / "origin"
    shutil.copytree(str(table["model"]["checkpoint"]), origin)
    recipe = parse(table, model={"checkpoint": str(origin)}, compare={"save_models": True})
    (found,) = compare(recipe, tmp_path / "out", workers=1)
    assert [row["step"] for row in found.evals] == [0, TRAIN["steps"]]
    (job,) = plan(recipe, tmp_path / "out")
    assert is_complete(job, recipe)
    shutil.rmtree(job.folder / FINAL)
    assert not is_complete(job, recipe)
    without = replace(recipe, compare=replace(recipe.compare, save_models=False))
    assert is_complete(job, without)
    (origin / "config.json").write_text((origin / "config.json").read_text() + "\n")
    assert not is_complete(job, without)


def toml(table: dict[str, dict[str, object]], path: Path) -> Path:
    lines = []
    for section, values in table.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    path.write_text("\n".join(lines))
    return path


def test_the_command_line_pretrains_and_fine_tunes_in_two_commands(
    text, table, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = {"source": str(text), "domains": OLD, "seq_len": 32}
    toml({"model": MODEL, "data": data, "train": TRAIN}, tmp_path / "pre.toml")
    tune = {**table, "model": {"checkpoint": "runs/pre/seed0/final"}}
    toml(tune, tmp_path / "tune.toml")
    call = CliRunner().invoke
    done = call(app, ["train", "pre.toml"])
    assert done.exit_code == 0, done.output
    assert "Model: runs/pre/seed0/final" in done.output
    done = call(app, ["finetune", "tune.toml", "--method", "switch", "--seed", "1"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs" / "tune" / "switch-seed1" / FINAL / "config.json").is_file()
    assert "before and after" in done.output
    for words, message in (
        (["finetune", "tune.toml", "--method", "switch", "--seed", "1"], "of an earlier run"),
        (["finetune", "pre.toml"], "names no [model] checkpoint"),
        (["train", "tune.toml"], "run `moebalance finetune tune.toml`"),
    ):
        done = call(app, words)
        assert done.exit_code == 2
        assert message in done.output.replace("\n", " ")
