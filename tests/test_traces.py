"""What other tools write about routing, in the report and the doctor; and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from families import tiny, tokens
from moebalance.lab.cli import app
from moebalance.lab.traces import Missing, find_traces, is_trace
from moebalance.report import summarise
from moebalance.report.diagnosis import diagnose, render
from moebalance.runlog import Run
from synthetic_runs import write_run

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def choices(tokens: int = 40, seed: int = 0, experts: int = EXPERTS) -> Tensor:
    """(T, L, K), no expert twice for one token; expert 0 is in every choice of layer 0."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, LAYERS, experts, generator=generator)
    chosen[:, 0, 0] = 2
    return chosen.topk(TOP_K).indices


def expected(chosen: Tensor, experts: int = EXPERTS) -> list[list[float]]:
    """The load of every layer, counted one by one."""
    loads = []
    for layer in chosen.transpose(0, 1):
        counts = [0] * experts
        for expert in layer.reshape(-1).tolist():
            counts[expert] += 1
        loads.append([count / sum(counts) for count in counts])
    return loads


def only(path: Path, **missing: int) -> Run:
    assert is_trace(path)
    (run,) = find_traces(path, Missing(**missing)).runs
    return run


def load(run: Run) -> list[Any]:
    return [pytest.approx(line, abs=1e-6) for line in run.evals[-1]["load"]]


def megatron_rows(chosen: Tensor, step: int, rank: int = 0, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": i + 1,
            "rank": rank,
            "num_tokens": len(chosen),
            "topk": TOP_K,
            "top_indices": layer.tolist(),
            **more,
        }
        for i, layer in enumerate(chosen.transpose(0, 1))
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Megatron


def test_a_router_trace_has_a_step_for_each_of_its_own(tmp_path):
    parts = [choices(seed=step) for step in range(6)]
    rows = [row for step, part in enumerate(parts) for row in megatron_rows(part, step)]
    run = only(write_lines(tmp_path / "router_trace_rank0.jsonl", rows), experts=EXPERTS)
    assert [row["step"] for row in run.snapshots] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4, 5, 6]
    assert load(run) == expected(torch.cat(parts[-2:]))  # the last third of the steps
    first = run.snapshots[0]["load"]
    assert [pytest.approx(line, abs=1e-6) for line in first] == expected(parts[0])
    assert run.steps[0]["maxvio_worst"] == pytest.approx(8 * 0.5 - 1)  # half of layer 0's choices
    assert run.header["model"]["layers"] == ["layer 1", "layer 2", "layer 3"]
    assert "soft_maxvio" not in run.steps[0]  # a trace of choices has no scores


def test_micro_batches_and_ranks_of_a_step_are_added_up(tmp_path):
    a, b, c = (choices(seed=seed) for seed in range(3))
    write_lines(tmp_path / "router_trace_rank0.jsonl", megatron_rows(a, 0) + megatron_rows(b, 0))
    write_lines(tmp_path / "router_trace_rank1.jsonl", megatron_rows(c, 0, rank=1))
    run = only(tmp_path, experts=EXPERTS)
    assert load(run) == expected(torch.cat([a, b, c]))
    assert run.evals[-1]["tokens"] == 120


def test_traces_of_two_files_are_two_rows_of_one_report(tmp_path):
    for name in ("before", "after"):
        write_lines(tmp_path / f"{name}.jsonl", megatron_rows(choices(seed=len(name)), 0))
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("before", "after")]
    runs = [run for path in paths for run in find_traces(Path(path), Missing(EXPERTS)).runs]
    (section,) = summarise(runs)
    assert [m.label for m in section.methods] == [f"Trace · file={p}" for p in sorted(paths)]
    assert [m.seeds for m in section.methods] == [1, 1]
    assert section.title == "Runs"
    told = render(diagnose(runs), width=999)
    assert f"Trace · file={paths[0]}, 1 step, {tmp_path}" in told


def test_layers_of_multi_token_prediction_are_none_of_the_decoder(tmp_path):
    rows = megatron_rows(choices(), 0)
    rows.append({**rows[0], "block": "mtp", "mtp_idx": 0, "top_indices": [[7, 6]]})
    run = only(write_lines(tmp_path / "t.jsonl", rows), experts=EXPERTS)
    assert run.header["model"]["layers"][-1] == "layer 4 (mtp 0.1)"
    assert run.evals[-1]["load"][3] == [0] * 6 + [0.5, 0.5]
    assert load(run)[:3] == expected(choices())


def test_the_number_of_experts_comes_from_logits_else_it_is_a_guess_that_is_said(tmp_path):
    few = choices(experts=4)
    guessed = find_traces(write_lines(tmp_path / "a.jsonl", megatron_rows(few, 0)), Missing())
    assert guessed.runs[0].header["model"]["num_experts"] == 4
    assert "--experts" in guessed.notes[0]
    rows = megatron_rows(few, 0, logit_offset=0, logit_bytes=1, logit_shape=[40, 16])
    known = find_traces(write_lines(tmp_path / "b.jsonl", rows), Missing())
    assert known.runs[0].header["model"]["num_experts"] == 16
    assert not known.notes


def with_sidecars(folder: Path, *, score: str | None = "sigmoid") -> tuple[list[Tensor], Tensor]:
    """A trace of one step with its logits and its dumped routers, as Megatron-Core writes them."""
    logits = [torch.randn(40, EXPERTS + 1).bfloat16() for _ in range(LAYERS)]
    chosen = torch.stack([z[:, :EXPERTS].topk(TOP_K).indices for z in logits], dim=1)
    rows, held = megatron_rows(chosen, 0), b""
    for row, z in zip(rows, logits, strict=True):
        part = z.view(torch.int16).numpy().tobytes()
        row |= {"logit_offset": len(held), "logit_bytes": len(part), "logit_shape": list(z.shape)}
        held += part
    write_lines(folder / "router_trace_rank0.jsonl", rows)
    (folder / "logits_rank0.bin").write_bytes(held)
    (folder / "hidden_states_rank0.bin").write_bytes(b"unread")
    if score:
        layer = {"weight": torch.zeros(EXPERTS + 1, 4), "expert_bias": None, "topk": TOP_K}
        state = {i + 1: {**layer, "score_function": score} for i in range(LAYERS)}
        torch.save(state, folder / "router_state_rank0.pt")
    return logits, chosen


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_logits_and_routers_next_to_a_trace_give_the_soft_load(tmp_path, score):
    logits, chosen = with_sidecars(tmp_path, score=score)
    run = only(tmp_path)
    assert load(run) == expected(chosen, EXPERTS + 1)
    affinities = [z.float().sigmoid() if score == "sigmoid" else z.float().exp() for z in logits]
    soft = torch.stack([(a / a.sum(-1, keepdim=True)).mean(0) for a in affinities])
    torch.testing.assert_close(torch.tensor(run.evals[-1]["soft"]), soft, atol=1e-5, rtol=0)
    assert "soft_hard_gap" in run.evals[-1]


def test_routers_next_to_a_trace_say_how_many_experts_there_are(tmp_path):
    with_sidecars(tmp_path)
    write_lines(tmp_path / "router_trace_rank0.jsonl", megatron_rows(choices(), 0))
    found = find_traces(tmp_path / "router_trace_rank0.jsonl", Missing())
    assert found.runs[0].header["model"]["num_experts"] == EXPERTS + 1
    assert not found.notes


def test_logits_without_the_score_function_are_left_out_and_said_to_be(tmp_path):
    with_sidecars(tmp_path, score=None)
    found = find_traces(tmp_path, Missing())
    assert "soft" not in found.runs[0].evals[-1]
    assert "--moe-routing-trace-dump-weights" in found.notes[0]


def test_damaged_files_next_to_a_trace_are_refused_by_name(tmp_path):
    with_sidecars(tmp_path)
    logits = tmp_path / "logits_rank0.bin"
    logits.write_bytes(logits.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"logits_rank0\.bin does not hold .* layer 3"):
        find_traces(tmp_path, Missing())
    torch.save([1], tmp_path / "router_state_rank0.pt")
    with pytest.raises(ValueError, match=r"router_state_rank0\.pt is no dump of routers"):
        find_traces(tmp_path, Missing())


@pytest.mark.parametrize("name", ["logits_rank0.bin", "hidden_states_rank0.bin"])
@pytest.mark.parametrize("command", ["report", "doctor"])
def test_a_file_next_to_a_trace_names_the_trace(tmp_path, name, command):
    with_sidecars(tmp_path)
    done = CliRunner().invoke(app, [command, str(tmp_path / name)])
    assert done.exit_code == 2
    assert "router_trace_rank0.jsonl, or the folder" in done.output


@pytest.mark.parametrize("line", ["{", '{"step": 0, "layer": 1}', '{"top_indices": "x"}', "[]"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = write_lines(tmp_path / "t.jsonl", megatron_rows(choices(), 0))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 4"):
        find_traces(path, Missing())


def test_an_expert_beyond_the_given_number_is_refused(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", megatron_rows(choices(), 0))
    with pytest.raises(ValueError, match="--experts"):
        find_traces(path, Missing(experts=4))


# Rollouts


def rollout_files(folder: Path, chosen: Tensor) -> dict[str, Path]:
    """The same choices in every form."""
    flat = base64.b64encode(chosen.numpy().astype("<i4").tobytes()).decode()
    np.save(folder / "a.npy", chosen.numpy())
    np.savez(folder / "a.npz", routed_experts=chosen.numpy())
    torch.save({"routed_experts": chosen}, folder / "dict.pt")
    torch.save({"routed_experts": [chosen[:7], chosen[7:]]}, folder / "list.pt")
    torch.save(chosen, folder / "alone.pt")
    save_file({"routed_experts": chosen}, folder / "a.safetensors")
    halves = [{"routed_experts": part.tolist()} for part in (chosen[:11], chosen[11:])]
    write_lines(folder / "lines.jsonl", halves)
    write_lines(folder / "served.jsonl", [{"text": "", "meta_info": {"routed_experts": flat}}])
    return {path.name: path for path in folder.iterdir()}


FORMS = ["a.npy", "a.npz", "dict.pt", "list.pt", "alone.pt", "a.safetensors", "lines.jsonl"]


@pytest.mark.parametrize("form", [*FORMS, "served.jsonl"])
def test_rollouts_are_read_in_every_form(tmp_path, form):
    chosen = choices()
    path = rollout_files(tmp_path, chosen)[form]
    run = only(path, experts=EXPERTS, layers=LAYERS, top_k=TOP_K)
    assert load(run) == expected(chosen)
    assert run.evals[-1]["tokens"] == 40
    assert run.header["model"]["top_k"] == TOP_K


def test_flat_base64_needs_layers_and_top_k_and_whole_tokens(tmp_path):
    path = rollout_files(tmp_path, choices())["served.jsonl"]
    with pytest.raises(ValueError, match="--layers and --top-k"):
        find_traces(path, Missing())
    with pytest.raises(ValueError, match="no whole tokens"):
        find_traces(path, Missing(layers=7, top_k=TOP_K))


def test_padding_and_dense_layers_count_nothing(tmp_path):
    chosen = choices()
    padded = torch.zeros(2, 30, LAYERS + 1, TOP_K, dtype=torch.long)
    padded[..., 0, :] = -1  # a dense layer
    padded[0, :, 1:], padded[1, :10, 1:] = chosen[:30], chosen[30:]
    mask = torch.ones(2, 30)
    mask[1, 10:] = 0
    torch.save({"routed_experts": padded, "attention_mask": mask}, tmp_path / "r.pt")
    run = only(tmp_path / "r.pt", experts=EXPERTS)
    assert load(run) == expected(chosen)
    assert run.header["model"]["layers"] == ["layer 1", "layer 2", "layer 3"]


def test_wrong_shapes_are_refused_with_the_right_ones(tmp_path):
    torch.save({"routed_experts": torch.zeros(4, 2, dtype=torch.int32)}, tmp_path / "flat.pt")
    with pytest.raises(ValueError, match=r"\(tokens, layers, top_k\)"):
        find_traces(tmp_path / "flat.pt", Missing())
    held = {"routed_experts": choices(), "attention_mask": torch.ones(3)}
    torch.save(held, tmp_path / "mask.pt")
    with pytest.raises(ValueError, match="attention_mask"):
        find_traces(tmp_path / "mask.pt", Missing())


# Router logits


@pytest.mark.parametrize("form", ["tuple.pt", "dict.pt", "numbered.safetensors"])
def test_logits_of_a_model_give_the_loads_that_it_had(tmp_path, form):
    model, ids = tiny("mixtral").eval(), tokens()
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    path = tmp_path / form
    if form == "tuple.pt":
        torch.save(logits, path)
    elif form == "dict.pt":
        torch.save({"router_logits": logits}, path)
    else:
        save_file({f"router_logits.{i}": z.contiguous() for i, z in enumerate(logits)}, path)
    run = only(path, top_k=2)
    chosen = torch.stack([z.topk(2).indices for z in logits], dim=1)
    assert load(run) == expected(chosen, logits[0].shape[-1])
    soft = torch.stack([z.softmax(-1).mean(0) for z in logits])
    torch.testing.assert_close(torch.tensor(run.evals[-1]["soft"]), soft, atol=1e-5, rtol=0)
    assert "soft_hard_gap" in run.evals[-1]


def test_padding_is_left_out_of_logits(tmp_path):
    logits = torch.randn(2, 5, EXPERTS)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.save({"router_logits": (logits,), "attention_mask": mask}, tmp_path / "l.pt")
    run = only(tmp_path / "l.pt", top_k=1)
    assert run.evals[-1]["tokens"] == 8
    real = logits.reshape(-1, EXPERTS)[mask.reshape(-1).bool()]
    assert load(run) == expected(real.topk(1).indices[:, None])


def test_logits_without_top_k_and_of_no_numbers_are_refused(tmp_path):
    torch.save((torch.randn(4, EXPERTS),), tmp_path / "l.pt")
    with pytest.raises(ValueError, match="--top-k"):
        find_traces(tmp_path / "l.pt", Missing())
    with pytest.raises(ValueError, match="1 to 8 fit"):
        find_traces(tmp_path / "l.pt", Missing(top_k=9))
    torch.save((torch.full((4, EXPERTS), float("nan")),), tmp_path / "n.pt")
    with pytest.raises(ValueError, match="NaN"):
        find_traces(tmp_path / "n.pt", Missing(top_k=2))


def test_a_file_of_something_else_is_refused_with_what_is_known(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds weight; known are router traces"):
        find_traces(tmp_path / "w.pt", Missing())
    torch.save({"router_logits": tiny}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="not loaded for safety"):
        find_traces(tmp_path / "code.pt", Missing())


# The commands


def test_the_report_shows_a_trace_next_to_runs(tmp_path):
    rows = [row for step in range(4) for row in megatron_rows(choices(seed=step), step)]
    trace = write_lines(tmp_path / "trace.jsonl", rows)
    write_run(tmp_path / "run", "phi")
    out = tmp_path / "r.html"
    asked = ["report", str(trace), str(tmp_path / "run"), "--experts", "8", "--out", str(out)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "Trace" in out.read_text("utf-8")


def test_the_report_lies_next_to_a_single_trace(tmp_path):
    trace = write_lines(tmp_path / "trace.jsonl", megatron_rows(choices(), 0))
    done = CliRunner().invoke(app, ["report", str(trace)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").exists()
    assert "give --experts" in done.output


def test_the_doctor_names_a_dead_expert_of_a_trace_and_asks_for_no_longer_training(tmp_path):
    chosen = choices(tokens=4000, experts=6)
    trace = write_lines(tmp_path / "trace.jsonl", megatron_rows(chosen, 0))
    done = CliRunner().invoke(app, ["doctor", str(trace), "--experts", "8"])
    text = " ".join(done.output.split())
    assert "dead" in text
    assert "This is a trace" in text
    assert "Train longer" not in text


def test_a_run_log_is_no_trace(tmp_path):
    write_run(tmp_path / "run", "phi")
    assert not is_trace(tmp_path / "run")
    assert not is_trace(tmp_path / "run" / "log.jsonl")
    assert not is_trace(tmp_path / "nothing")
