"""Attention of the plugin for vLLM on blocks: plain PyTorch against a sum in float64, kernels against the same."""

import pytest
import torch
import triton
import triton.language as tl

from compress_vllm import kernel, plain
from compress_vllm.rule import Rule

RULES = [
    Rule(4, 30, 0),
    Rule(64, 40, 256),
    Rule(0, 5, 512),
    Rule(64, 70, 128, 64),
    Rule(3, -20, 512),
    Rule(0, 48, 0),
    Rule(200, 1, 0),  # everything, so far
]


class Step:
    """Requests in the middle of their prompts, or of their answers, on blocks in no order."""

    def __init__(self, rule, counts, befores, groups=2, share=2, size=16, block=16, dtype=torch.float32, pad=0):
        self.rule, self.counts, self.befores = rule, counts, befores
        self.groups, self.block = groups, block
        lengths = [before + count for before, count in zip(befores, counts, strict=True)]
        most = -(-max(lengths) // block)
        blocks = 1 + sum(-(-length // block) for length in lengths)
        # Block 0 is what freed entries of the table point to; blocks have heads before tokens, or behind.
        cache = torch.full((blocks, block, groups, 2 * size), float("nan"), dtype=dtype).transpose(1, 2)
        self.cache, self.table = cache, torch.zeros(len(counts), most + 3, dtype=torch.int32)
        free = (torch.randperm(blocks - 1) + 1).tolist()
        tokens = sum(counts)
        self.query = torch.randn(tokens + pad, groups * share, size).to(dtype)
        self.key, self.value = (torch.randn(tokens + pad, groups, size).to(dtype) for _ in range(2))
        self.keys, self.values, slots, start = [], [], [], 0
        for row, (count, before) in enumerate(zip(counts, befores, strict=True)):
            keys, values = (torch.randn(before + count, groups, size).to(dtype) for _ in range(2))
            keys[before:], values[before:] = self.key[start : start + count], self.value[start : start + count]
            held = rule.held(before, block)
            for number in range(-(-(before + count) // block)):
                if number in held or number * block + block > before:
                    self.table[row, number] = free.pop()
            for place in range(before):
                where = int(self.table[row, place // block])
                if where:
                    cache[where, :, place % block] = torch.cat([keys[place], values[place]], dim=-1)
            slots += [
                int(self.table[row, place // block]) * block + place % block for place in range(before, before + count)
            ]
            start += count
            self.keys.append(keys)
            self.values.append(values)
        self.slots = torch.tensor(slots + [-1] * pad)
        self.starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)

    def expected(self, scale, cap, extra=None):
        """In float64, request by request and query by query."""
        rows = []
        for number, (count, before) in enumerate(zip(self.counts, self.befores, strict=True)):
            start = int(self.starts[number])
            for place in range(count):
                t = before + place
                seen = [j for j in range(t + 1) if j < self.rule.sink or j >= self.rule.first(t)]
                query = self.query[start + place].double().unflatten(0, (self.groups, -1))
                key, value = self.keys[number][seen].double(), self.values[number][seen].double()
                scores = torch.einsum("ghd,lgd->ghl", query, key) * scale
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                if extra is not None:
                    scores = torch.cat([scores, extra.double().view(self.groups, -1, 1)], dim=-1)
                weights = scores.softmax(-1)[..., : len(seen)]
                rows.append(torch.einsum("ghl,lgd->ghd", weights, value).flatten(0, 1))
        return torch.stack(rows)

    def by_kernel(self, scale, cap=None, extra=None):
        kernel.store(self.cache, self.key, self.value, self.slots)
        out = torch.full_like(self.query, float("nan"))
        most, longest = max(self.counts), int(self.lengths.max())
        arguments = (self.table, self.starts, self.lengths, most, longest, scale, cap, out, extra)
        kernel.attend(self.query, self.cache, self.rule, *arguments)
        return out

    def by_plain(self, scale, cap=None, extra=None):
        plain.store(self.cache, self.key, self.value, self.slots)
        out = torch.full_like(self.query, float("nan"))
        batch = plain.batch_of(self.rule, self.block, self.starts.tolist(), self.lengths.tolist(), self.table)
        plain.attend(self.query, self.cache, batch, scale, cap, out, extra)
        return out


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_prompts_chunks_and_single_tokens_in_one_batch(rule):
    step = Step(rule, counts=[1, 37, 1, 70], befores=[150, 0, 3, 129])
    expected = step.expected(0.3, None)
    for found in (step.by_plain(0.3), step.by_kernel(0.3)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[3], RULES[6]], ids=str)
def test_single_tokens_split_into_segments(rule):
    step = Step(rule, counts=[1, 1], befores=[301, 66], share=3, size=24, block=32)
    expected = step.expected(0.2, None)
    for found in (step.by_plain(0.2), step.by_kernel(0.2)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("counts", "befores"), [([1] * 3, [40, 0, 99]), ([5, 1], [64, 40])])
def test_a_cap_on_scores_and_half_precision(counts, befores):
    step = Step(Rule(4, 30, 64), counts, befores, groups=1, share=5, size=32, dtype=torch.float16)
    expected = step.expected(1.0, 2.0)
    for found in (step.by_plain(1.0, 2.0), step.by_kernel(1.0, 2.0)):
        torch.testing.assert_close(found.double(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(("counts", "befores"), [([1, 1], [301, 66]), ([5, 1], [64, 40])])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_logit_of_each_head_that_stands_for_no_value(counts, befores, cap):
    """Single tokens are split into segments, of which one has it."""
    step, extra = Step(Rule(64, 40, 256), counts, befores), torch.tensor([-1.0, 4.0, 0.5, 2.0])
    expected = step.expected(0.3, cap, extra)
    assert (expected - step.expected(0.3, cap)).abs().max() > 0.1
    for found in (step.by_plain(0.3, cap, extra), step.by_kernel(0.3, cap, extra)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_stores_nothing_and_harms_nothing():
    """What a CUDA graph for more requests does: tokens without a slot, requests without tokens."""
    step = Step(Rule(4, 30, 0), counts=[1, 1], befores=[100, 7], pad=2)
    step.starts = torch.cat([step.starts, step.starts[-1:].repeat(2)])
    step.lengths = torch.nn.functional.pad(step.lengths, (0, 2))
    step.table = torch.nn.functional.pad(step.table, (0, 0, 0, 2))
    empty = step.cache[0].clone()
    found = step.by_kernel(0.3)
    torch.testing.assert_close(found[:2].double(), step.expected(0.3, None), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.cache[0], empty, rtol=0, atol=0, equal_nan=True)


@triton.jit
def first_keys(found_ptr, positions_ptr, alpha, beta, granule, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(found_ptr + place, kernel._first(tl.load(positions_ptr + place), alpha, beta, granule))


def test_positions_whose_products_32_bits_cannot_hold():
    positions = torch.tensor([0, 1, 63, 1023, 1024, 2_000_000, 3_000_000, 100_000_001], dtype=torch.int32)
    for rule in (Rule(0, 7, 513), Rule(64, 100, 1023, 64), Rule(0, -5, 1000), Rule(0, 9, 0)):
        found = torch.empty_like(positions)
        first_keys[(1,)](found, positions, rule.alpha, rule.beta_units, rule.granule, COUNT=len(positions))
        assert found.tolist() == [rule.first(position) for position in positions.tolist()]
