"""An engine of your own around KVCache: continuous batching for a transformers model, with a kernel of your choice.

    python examples/your_own_engine.py [MODEL_DIRECTORY]

docs/your-own-engine.md goes through it line by line.
"""

import sys
from collections import deque
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from vattention import KVCache, KVLayout


@dataclass
class Running:
    """A request, its place in the cache, and how much of it is there."""

    number: int
    slot: int
    tokens: list[int]
    end: int
    cached: int = 0


def attention(module, query, key, value, mask, *, scaling=None, engine, **_):
    """Write the new K and V behind the old ones, then any kernel: it sees plain contiguous tensors."""
    keys, values = engine.cache.layer(module.layer_idx)
    outputs, row = [], 0
    for request in engine.running:
        start, end = request.cached, len(request.tokens)
        rows = slice(row, row := row + end - start)
        keys[request.slot, start:end] = key[0, :, rows].transpose(0, 1)
        values[request.slot, start:end] = value[0, :, rows].transpose(0, 1)
        k, v = (side[request.slot, :end].transpose(0, 1)[None] for side in (keys, values))
        seen = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        outputs.append(scaled_dot_product_attention(query[:, :, rows], k, v, seen, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2), None


class Engine:
    """Greedy generation for as many requests as fit, each in a slot of its own."""

    def __init__(self, model, *, memory="256MiB", max_num_seqs=8, max_model_len=2048):
        AttentionInterface.register("mine", attention)
        model.set_attn_implementation("mine")
        config = model.config
        shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        layout = KVLayout(*shape, model.dtype, max_num_seqs, max_model_len)
        self.model, self.cache, self.running = model, KVCache(layout, memory=memory), []

    @torch.inference_mode()
    def generate(self, prompts, max_tokens):
        """The tokens that follow each prompt, a list of token ids each."""
        waiting, answers = deque(enumerate(prompts)), {}
        while waiting or self.running:
            while waiting and (slot := self._admit(len(waiting[0][1]) + max_tokens)) is not None:
                number, prompt = waiting.popleft()
                self.running.append(Running(number, slot, list(prompt), len(prompt) + max_tokens))
            self.cache.step({request.slot: len(request.tokens) for request in self.running})  # pages, then the pass
            new = [request.tokens[request.cached :] for request in self.running]
            positions = [torch.arange(request.cached, len(request.tokens)) for request in self.running]
            flat = torch.cat([torch.tensor(tokens) for tokens in new])[None]  # one after the other, no padding
            logits = self.model(flat, position_ids=torch.cat(positions)[None], use_cache=False, engine=self).logits[0]
            last = torch.tensor([len(tokens) for tokens in new]).cumsum(0) - 1
            for request, token in zip(self.running, logits[last].argmax(-1).tolist(), strict=True):
                request.cached = len(request.tokens)
                request.tokens.append(token)
                if len(request.tokens) == request.end:
                    answers[request.number] = request.tokens[-max_tokens:]
                    self.cache.free(request.slot)  # its pages stay mapped for whoever comes next
            self.running = [request for request in self.running if len(request.tokens) < request.end]
        return [answers[number] for number in range(len(prompts))]

    def _admit(self, tokens):
        """A slot, if everybody can still grow to the end; a real engine would preempt instead."""
        fits = self.cache.fits({request.slot: request.end for request in self.running}, [tokens])
        return self.cache.alloc() if fits else None


if __name__ == "__main__":
    if len(sys.argv) > 1:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    else:
        small = LlamaConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
        model = AutoModelForCausalLM.from_config(small).eval()
    engine = Engine(model)
    for answer in engine.generate([[1, 2, 3], [4, 5, 6, 7, 8], list(range(300))], max_tokens=16):
        print(answer)
    print(engine.cache.stats())
    engine.cache.close()
