"""Loads for serving engines: what is written, from where, and read back as the engines read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moebalance as mb
from documents import ROOT, blocks
from moebalance.integrations import serving
from moebalance.runlog import RunLog

EXPERTS = 4


def trained(names: tuple[str, ...] = ("layers.0", "layers.1")) -> mb.Balancing:
    """Two routers after one step of 32 tokens, the second much less even."""
    layers = {name: mb.BalancedRouter(mb.SwitchLoss(), EXPERTS, 2, name=name) for name in names}
    balancing = mb.Balancing(mb.SwitchLoss(), layers)
    for tilt, router in enumerate(layers.values()):
        logits = torch.randn(32, EXPERTS, generator=torch.Generator().manual_seed(tilt))
        weights, _ = router((logits + tilt * torch.arange(EXPERTS)).requires_grad_())
        weights.square().sum().backward()
    balancing.step()
    return balancing


def read_as_sglang(path: Path) -> torch.Tensor:
    """What SGLang's init_by_eplb makes of the file: (1, L, E)."""
    counts = torch.tensor(json.loads(path.read_text())["logical_count"])
    return counts.unsqueeze(0) if counts.dim() == 2 else counts


def test_a_handles_loads_come_back_from_the_file_that_sglang_reads(tmp_path):
    balancing = trained()
    path = serving.save_sglang(balancing, tmp_path / "loads.json")
    counts = read_as_sglang(path)
    assert counts.shape == (1, 2, EXPERTS)
    assert counts.dtype == torch.int64
    for row, (hard, _) in zip(counts[0], balancing.loads().values(), strict=True):
        assert row.sum() == 64
        assert torch.equal(row / row.sum(), hard)


def test_vllm_gets_int64_rows_of_the_moe_layers_alone():
    balancing = trained(("layers.1", "layers.3"))
    load = serving.vllm_expert_load(balancing)
    assert load.dtype == torch.int64
    expected = [layer.last_sums.counts.long() for layer in balancing.layers.values()]
    assert torch.equal(load, torch.stack(expected))


def test_dense_layers_get_a_row_of_zeros_for_sglang(tmp_path):
    balancing = trained(("layers.1", "layers.3"))
    (counts,) = read_as_sglang(serving.save_sglang(balancing, tmp_path / "l.json", num_layers=5))
    assert counts.sum(1).tolist() == [0, 64, 0, 64, 0]
    assert torch.equal(counts[[1, 3]], serving.vllm_expert_load(balancing))


def test_a_missing_number_of_layers_is_asked_for_where_some_are_dense(tmp_path):
    with pytest.raises(ValueError, match=r"numbers \[1, 3\].*num_layers=config"):
        serving.save_sglang(trained(("layers.1", "layers.3")), tmp_path / "l.json")
    with pytest.raises(ValueError, match="num_layers=3, but a balanced layer is number 3"):
        serving.save_sglang(trained(("layers.1", "layers.3")), tmp_path / "l.json", num_layers=3)
    with pytest.raises(ValueError, match=r"ends in \.json"):
        serving.save_sglang(trained(), tmp_path / "loads")


def test_a_monitor_its_log_and_its_evaluation_export_the_same_loads(tmp_path):
    router = mb.BalancedRouter(mb.NoBalancing(), EXPERTS, 2)
    with mb.monitor(router, tmp_path, snapshot_every=1) as watch:
        logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(0))
        router(logits.requires_grad_())[0].sum().backward()
        watch.step()
        router.eval()(logits)
        live = serving.vllm_expert_load(watch).double()
        seen = serving.vllm_expert_load(watch.balancing.evaluation()[1]).double()
    logged = serving.vllm_expert_load(tmp_path).double()
    assert abs(logged.sum() - serving.PARTS) <= EXPERTS / 2  # a log rounds loads to 6 digits
    torch.testing.assert_close(logged / serving.PARTS, live / live.sum(), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen / serving.PARTS, live / live.sum(), rtol=0, atol=1e-6)


def test_a_source_without_loads_is_refused(tmp_path):
    balancing = mb.attach(mb.BalancedRouter(mb.SwitchLoss(), EXPERTS, 2))
    with pytest.raises(ValueError, match="Balancing has no loads yet"):
        serving.expert_counts(balancing)
    with RunLog(tmp_path) as log:
        log.write("header", method="phi")
    with pytest.raises(ValueError, match="has no loads yet"):
        serving.expert_counts(tmp_path)


def test_a_run_log_is_exported_without_torch(tmp_path):
    with RunLog(tmp_path / "run") as log:
        log.write("header", method="phi", model={"layers": 2})
        log.write("snapshot", step=1, load=[[0.25, 0.75], [0.5, 0.5]])
    code = (
        "import sys; from moebalance.integrations.serving import save_sglang; "
        f"save_sglang({str(tmp_path / 'run')!r}, {str(tmp_path / 'loads.json')!r}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (counts,) = read_as_sglang(tmp_path / "loads.json")
    assert counts.tolist() == [[250000, 750000], [500000, 500000]]


def test_the_page_exports_loads_and_measures_forced_routing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
        )
    )
    ids = (torch.arange(256) % 32).view(1, 256)

    def tokens_per_second(model, balancing):
        """Stands for a measurement: how uneven the experts' work is."""
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
        return balancing.metrics()["maxvio"]

    export, forced = (block.code for block in blocks(ROOT / "docs" / "serving.md", "python"))
    with mb.attach(model, mb.LossFree()) as balancing:
        tokens_per_second(model, balancing)
        names = {"model": model, "balancing": balancing}
        exec(export, names)
    assert names["load"].sum(1).tolist() == [512, 512]
    assert read_as_sglang(Path("loads.json")).shape == (1, 2, EXPERTS)
    exec(forced, {"model": model, "tokens_per_second": tokens_per_second})
    balanced, random, skewed = (
        float(row.split()[-1]) for row in capsys.readouterr().out.splitlines()
    )
    assert balanced == 0 < random < skewed == pytest.approx(0.5, abs=0.05)
