"""What makes a GPU fast: one synchronisation per group, no work per length, no recompilation, CUDA graphs; NCCL."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from test_parity import error, images, make, ragged
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from iared2.export.static import FixedCount
from iared2.model.decide import Decision
from iared2.train.finetune import FinetuneStage


@contextmanager
def synchronisations(mode):
    """Under "warn" a list that every synchronisation joins; under "error" the first one raises."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]


@pytest.mark.parametrize("dropped", ["gone", "merged"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_one_synchronisation_per_group(dropped, grad, cuda):
    model, x = make(dtype=torch.bfloat16, dropped=dropped).to(cuda, torch.bfloat16), images().to(cuda, torch.bfloat16)
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # the first time, libraries start
            with synchronisations("warn") as found:
                logits = model(x, ragged_at(cuda))
                if grad:
                    logits.square().sum().backward()
        assert 1 <= len(found) <= model.num_groups, found


def ragged_at(device):
    """`ragged` without a copy to the device."""
    kept = [ragged(torch.empty(6, 192), torch.ones(6, 192, dtype=torch.bool), group).to(device) for group in range(3)]
    return lambda scores, alive, group: alive & kept[group]


@pytest.mark.parametrize("family", ["class token", "average pooling"])
def test_nothing_else_synchronises(family, cuda):
    """Embedding, scores, decisions, blocks and head; only `select` may."""
    model, x = make(family, torch.bfloat16).to(cuda, torch.bfloat16), images().to(cuda, torch.bfloat16)
    decisions = Decision(0.5, max_tokens=100), Decision(num_keep=90), Decision(0.5, spread=1, grid_size=model.grid_size)
    with torch.inference_mode():
        whole = model.embed(x)
        packed = whole.select(ragged_at(cuda)(None, whole.alive, 0))
        for mode in ("default", "error"):  # the first time, libraries start
            with synchronisations(mode):
                model.embed(x)
                scores = model.score(packed, 1)
                for decision in decisions:
                    model.decide(scores, packed.alive, 1, decision)
                model.head(model.run_blocks(packed, 1))


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("part", ["interpreter", "blocks"])
@pytest.mark.parametrize("family", ["class token", "average pooling"])
def test_the_number_of_operations_does_not_grow_with_the_number_of_lengths(family, part, cuda):
    """Launches of small kernels, one per length, would take longer than the network."""
    model, x = make(family, torch.bfloat16).to(cuda, torch.bfloat16), images(12).to(cuda, torch.bfloat16)
    calls = []
    with torch.inference_mode():
        for lengths in (3, 12):
            whole = model.embed(x)
            share = torch.linspace(0.2, 0.9, lengths, device=cuda).repeat(12 // lengths)[:, None]
            packed = whole.select(torch.linspace(0, 1, 192, device=cuda) < share)
            assert len(packed.bucket_sizes) == lengths
            with Counting() as counting:
                _ = model.score(packed, 1) if part == "interpreter" else model.run_blocks(packed, 1)
            calls.append(counting.calls)
    assert calls[0] == calls[1]


def test_no_recompilation_over_ragged_batches(cuda):
    torch.compiler.reset()
    model, graphs = make(dtype=torch.bfloat16).to(cuda, torch.bfloat16), []
    batches = [images(n).to(cuda, torch.bfloat16) for n in (6, 4, 5, 3, 7)]
    with torch.no_grad():
        want = [model(x, ragged) for x in batches]
        model.compile()
        counters.clear()
        for x, plain in zip(batches, want, strict=True):
            got = model(x, ragged)
            assert float((got - plain).float().norm() / plain.float().norm()) < 0.05
            graphs.append(counters["stats"]["unique_graphs"])
    assert 1 <= graphs[1] <= 4, "one graph before the attention and one after it"
    assert graphs[1] == graphs[-1], graphs
    torch.compiler.reset()


def test_fixed_counts_replay_as_a_cuda_graph(cuda):
    model = make(dtype=torch.bfloat16)
    static = FixedCount(model, (150, 100, 50)).to(cuda, torch.bfloat16)
    x, other = (images(6) * scale for scale in (1, 0.5))
    pixels = x.to(cuda, torch.bfloat16)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                static(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, _ = static(pixels)
        for images_ in (x, other):
            pixels.copy_(images_)
            want, _ = static(pixels)
            with synchronisations("error"):
                graph.replay()
            torch.testing.assert_close(logits, want, rtol=0, atol=0.05)


def test_one_process_of_a_group_has_the_gradients_of_no_group(device):
    """NCCL with one process on a GPU: what it reduces is what was there, and no parameter is left out."""
    model, x, keys = make(), images().to(device), torch.arange(6, device=device)
    labels, gradients = torch.zeros(6, dtype=torch.int64, device=device), []
    # a store in memory: no port, no file
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (lambda stage: stage, DistributedDataParallel):
            stage = FinetuneStage(copy.deepcopy(model).to(device), 0, decide=ragged).train()
            loss, _ = wrap(stage)(x, labels, keys)
            loss.backward()
            gradients.append({name: p.grad for name, p in stage.named_parameters() if p.requires_grad})
    finally:
        dist.destroy_process_group()
    assert gradients[0].keys() == gradients[1].keys()
    assert error(gradients[1].values(), gradients[0].values()) < 1e-5
