"""Every promise of `attach` on one family: what holds is asserted, what cannot is a row's verdict.

`tests/family_page.py` makes the table of `docs/families.md` of them.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import moebalance as mb
from families import EXPECTED, loss, tiny, tokens
from moebalance.integrations.huggingface.scan import open_weights
from moebalance.lab.doctor.weights import check_resuming

PHI = mb.PhiBalancing(strength=8.0)


def phi(family: str) -> mb.PhiBalancing:
    """A strong φ-balancing; where some choices compute nothing, they are half as popular."""
    expected = EXPECTED[family]
    if not expected.empty:
        return PHI
    return replace(PHI, potential=PHI.potential.relative_to(expected.shares))


class Row(NamedTuple):
    """A line of the table."""

    family: str
    found: str
    gate: str
    loss_lever: str
    selection_lever: str
    checkpointing: str
    compile: str
    resumes: str
    verdict: str

    def __str__(self) -> str:
        return "| " + " | ".join(self) + " |"


def examine(family: str, *, brief: bool = False, whole: bool = True) -> Row:
    """Check one family; AssertionError where a promise is broken.

    Args:
        family: one of `families.FAMILIES`.
        brief: leave out what depends on the release of Transformers: compiling and resuming.
        whole: compile the whole model; else its MoE blocks, which takes a tenth of the time.
    """
    resumes = "–" if brief else check_resuming_trainer(family)
    try:
        sites = mb.huggingface.find_sites(tiny(family))
    except ValueError as refusal:
        _, known, reason = str(refusal).partition("cannot be balanced: ")
        if not known:
            raise
        return Row(family, *["–"] * 6, resumes, f"refused: {reason.rstrip('.')}")
    found = check_sites(family, sites)
    check_gradient(family, sites)
    check_statistics(family)
    lever = check_selection(family)
    check_detach(family)
    gate = type(sites[0].gate).__name__
    verdict = "full" if lever in ("native", "hook") else "loss lever only"
    if EXPECTED[family].empty:
        with pytest.raises(ValueError, match=r"cannot be balanced by .* equal use of all would"):
            mb.attach(tiny(family), PHI)
        verdict += ", given proportions"
    checkpointing, compiling = (
        check_checkpointing(family),
        "–" if brief else check_compile(family, whole=whole),
    )
    return Row(family, found, gate, "yes", lever, checkpointing, compiling, resumes, verdict)


def check_sites(family: str, sites: list[mb.huggingface.Site]) -> str:
    """Every router is found, with its number of experts and of choices."""
    expected = EXPECTED[family]
    fixed = 1 if family == "deepseek_v4" else 0  # its first layer routes by a table
    assert len(sites) == expected.routers - fixed
    for site in sites:
        columns = expected.num_experts + expected.empty
        assert (site.num_experts, site.top_k) == (columns, expected.top_k)
    note = ", one by table" if fixed else ""
    return f"{len(sites)} of {expected.routers}{note}"


def check_gradient(family: str, sites: list[mb.huggingface.Site]) -> None:
    """The injected gradient equals the explicit term, on every parameter of every router."""
    ids, model, method = tokens(), tiny(family), phi(family)
    names = [site.name for site in sites]
    with watch(model) as seen:
        value = task_loss(model, ids)
    value.backward(retain_graph=True)
    task = gradients(model, names)
    model.zero_grad()
    for answers, site in seen.values():
        for answer in answers:  # several where a layer is looped
            routing = mb.routing.route(answer.logits, answer.experts, site.gate)
            sums = mb.routing.measure(routing)
            step = mb.routing.Batch(routing, sums, sums)
            value = value + method.penalty(method.init(site.num_experts), step)
    value.backward()
    explicit = gradients(model, names)
    model.zero_grad()
    with mb.attach(model, method):
        task_loss(model, ids).backward()
        injected = gradients(model, names)
    for name in seen:
        term = (explicit[name] - task[name]).norm()
        assert (injected[name] - explicit[name]).norm() <= 1e-3 * term, name
        # The term is large enough against the rounding of the rest for that to mean something.
        assert term > 1e-4 * explicit[name].norm(), name


def check_statistics(family: str) -> None:
    """Counts and scores equal a recomputation from the router's own output, without padding."""
    ids, model = tokens(), tiny(family)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    masks = {"attention_mask": mask}
    if model.config.is_encoder_decoder:
        masks["decoder_attention_mask"] = mask
        masks["decoder_input_ids"] = ids
    real = mask.bool().reshape(-1)
    with mb.attach(model, mb.NoBalancing()) as balancing:
        with watch(model) as seen:
            task_loss(model, ids, **masks).backward()
        balancing.step()
        for name, (answers, site) in seen.items():
            sums = balancing.layers[name].last_sums
            assert sums.tokens.item() == 19 * len(answers), name
            chosen = torch.cat([answer.experts[real].reshape(-1) for answer in answers])
            assert torch.equal(sums.counts, torch.bincount(chosen, minlength=site.num_experts))
            scores = sum(site.gate.scores(a.logits)[real].sum(dim=0) for a in answers)
            torch.testing.assert_close(sums.scores, scores.detach())


def check_selection(family: str) -> str:
    """A price moves the choice and leaves the weights of who stays to the affinities alone."""
    model, ids = tiny(family).eval(), tokens()
    method = mb.LossFree(speed=10.0, proportions=EXPECTED[family].shares)
    site = mb.huggingface.find_sites(model)[0]
    if site.bias is None and site.why_fixed:
        with pytest.raises(ValueError, match=site.why_fixed):
            mb.attach(model, method)
        return f"none: {site.why_fixed}"
    # Deeper routers see other input once a choice changes: only the first can be compared.
    with watch(model) as seen, torch.no_grad():
        task_loss(model, ids)
    (before,), site = seen[site.name]
    busiest = int(torch.bincount(before.experts.reshape(-1), minlength=site.num_experts).argmax())
    with mb.attach(model, method) as balancing:
        sums = mb.routing.Sums(
            torch.ones(site.num_experts), torch.ones(site.num_experts), torch.tensor(1.0)
        )
        sums.counts[busiest] = 9.0
        for layer in balancing.layers.values():
            layer.count(sums)
        balancing.step()
        with watch(model) as seen, torch.no_grad():
            task_loss(model, ids)
        ((after,), _) = seen[site.name]
        torch.testing.assert_close(after.logits, before.logits)
        assert (before.experts == busiest).any()
        assert not (after.experts == busiest).any()
        if site.rule is not None:
            expected = site.weigh(after.logits, after.experts)
            torch.testing.assert_close(
                after.carrier.float(), expected.float(), rtol=1e-5, atol=1e-7
            )
        bias = site.bias
        assert bias is None or torch.equal(-bias.reshape(-1), balancing.layers[site.name].price)
    return "hook" if site.bias is None else "native"


def check_detach(family: str) -> None:
    """After `detach` outputs are bit-identical; the keys of the model's state never change."""
    model, ids = tiny(family), tokens()
    keys, before = list(model.state_dict()), task_loss(model, ids)
    with mb.attach(model, phi(family)) as balancing:
        task_loss(model, ids).backward()
        balancing.step()
        assert list(model.state_dict()) == keys
    assert torch.equal(task_loss(model, ids), before)
    assert hooks(model) == hooks(tiny(family))


def check_checkpointing(family: str) -> str:
    """Both kinds of activation checkpointing count once and charge alike."""
    try:
        checkpoint_activations(tiny(family))
    except ValueError:
        return "not in the model"
    plain = trained(family, lambda model: None)
    for reentrant in (False, True):

        def enable(model: nn.Module, reentrant: bool = reentrant) -> None:
            checkpoint_activations(model, {"use_reentrant": reentrant})
            model.enable_input_require_grads()

        same(trained(family, enable), plain)
    return "both kinds"


def checkpoint_activations(model: nn.Module, options: dict[str, bool] | None = None) -> None:
    """Switch activation checkpointing on, under the name that this Transformers has for it."""
    older = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", older)(options)


def check_resuming_trainer(family: str) -> str:
    """Whether a Trainer that resumes loads all of its own checkpoint, as the doctor says.

    It hands the files to `load_state_dict`, which passes over what has another name there.
    """
    model = tiny(family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        warned = bool(check_resuming(model, open_weights(Path(folder))))
        saved = load_file(Path(folder) / "model.safetensors")
    missing = set(model.load_state_dict(saved, strict=False).missing_keys)
    passed_over = missing - set(model.all_tied_weights_keys)
    assert bool(passed_over) == warned
    if not passed_over:
        return "whole"
    return "without experts" if any("expert" in name for name in passed_over) else "in part"


def check_compile(family: str, *, whole: bool = True) -> str:
    """A compiled model counts and charges alike, and hooks add no graph break to its own."""

    def compile(model: nn.Module) -> None:
        blocks = {s.name.rpartition(".")[0] for s in mb.huggingface.find_sites(model)}
        for name in [""] if whole else blocks:
            model.get_submodule(name).compile(backend="eager")

    def attached() -> None:
        same(trained(family, compile), trained(family, lambda model: None))

    def bare() -> None:
        model = tiny(family)
        compile(model)
        task_loss(model, tokens()).backward()

    breaks = graph_breaks(attached)
    if not breaks:
        return "whole graph"
    assert breaks <= graph_breaks(bare)
    return "with the model's own breaks"


def graph_breaks(run: Callable[[], None]) -> set[str]:
    """Why Dynamo gave up tracing, wherever it did."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run()
    return set(torch._dynamo.utils.counters["graph_break"])


def trained(family: str, prepare: Callable[[nn.Module], None]) -> tuple[list[Tensor], list[Tensor]]:
    """Counts of one training step and the routers' gradients."""
    model = tiny(family)
    sites = mb.huggingface.find_sites(model)
    with mb.attach(model, phi(family)) as balancing:
        prepare(model)
        task_loss(model, tokens()).backward()
        balancing.step()
        counts = [layer.last_sums.counts for layer in balancing.layers.values()]
    return counts, list(gradients(model, [site.name for site in sites]).values())


def same(
    mine: tuple[list[Tensor], list[Tensor]], theirs: tuple[list[Tensor], list[Tensor]]
) -> None:
    """Equal counts, and gradients but for rounding."""
    assert all(torch.equal(*pair) for pair in zip(mine[0], theirs[0], strict=True))
    for one, other in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def task_loss(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """The loss, with the same draws each time in the families that choose experts at random."""
    torch.manual_seed(0)
    return loss(model, ids, **kwargs)


def gradients(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """All gradients of each router, end to end."""
    found = {}
    for name in names:
        parameters = model.get_submodule(name).parameters()
        flat = [p.grad.reshape(-1).clone() for p in parameters if p.grad is not None]
        if flat:
            found[name] = torch.cat(flat)
    return found


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keep each router's answers, with its site."""
    seen: dict[str, Any] = {}
    handles = []
    for site in mb.huggingface.find_sites(model):

        def keep(_: nn.Module, __: Any, output: Any, site: mb.huggingface.Site = site) -> None:
            seen.setdefault(site.name, ([], site))[0].append(site.read(output))

        handles.append(site.router.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hooks(model: nn.Module) -> int:
    """Number of hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
