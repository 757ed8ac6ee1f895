"""Models whose answers are known: they have a state and a vocabulary, and no parameters."""

import re

import numpy as np
import torch
from torch import nn

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.lm import LMOutput, RecurrentLM
from statex_dist.models.mamba2.config import Mamba2Config

VOCAB = 258


def tiny_config(family="gla", **changes):
    values = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}
    if family == "gla":
        return GLAConfig(**{**values, "intermediate_size": 32, "use_short_conv": True, **changes})
    return Mamba2Config(**{**values, "head_dim": 16, "state_size": 4, "n_groups": 1, **changes})


def tiny_model(family="gla", *, seed=0, **changes):
    model = RecurrentLM(tiny_config(family, **changes))
    model.init_parameters(seed)
    return model


class StandIn(nn.Module):
    """Remembers all tokens that it has read (its state is the text so far); subclasses give the next tokens."""

    def __init__(self):
        super().__init__()
        self.config = tiny_config()
        self.state_places = [(0, "recurrent")]
        self.longest_call = 0
        self.state_places = [(0, "recurrent")]

    def anywhere(self, found):
        return found

    def next_tokens(self, history):
        """Return for every position of ``history [T]`` the token after it: ``[T]``."""
        raise NotImplementedError

    def forward(self, input_ids, *, states=None, output_states=False, overwrite_states=False, logits_to_keep=None):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.longest_call = max(self.longest_call, input_ids.shape[1])
        history = torch.cat([states[0][0], input_ids], dim=1) if states else input_ids
        following = torch.stack([self.next_tokens(row) for row in history])[:, -input_ids.shape[1] :]
        logits = nn.functional.one_hot(following[:, -(logits_to_keep or 0) :], self.config.vocab_size).float()
        return LMOutput(logits=logits, states=[(history,)] if output_states else None)


class Perfect(StandIn):
    """Says what followed the last time it saw the token."""

    def next_tokens(self, history):
        seen, following = {}, []
        for i, token in enumerate(history.tolist()):
            following.append(seen.get(token, 0))
            if i + 1 < len(history):
                seen[token] = int(history[i + 1])
        return torch.tensor(following)


class Says(StandIn):
    """Says fixed tokens behind a prompt of a known length, then repeats the last one."""

    def __init__(self, script, *, behind, vocab_size):
        super().__init__()
        self.config = tiny_config(vocab_size=vocab_size)
        self.script, self.behind = script, behind

    def next_tokens(self, history):
        said = range(1 - self.behind, len(history) + 1 - self.behind)
        return torch.tensor([self.script[min(max(i, 0), len(self.script) - 1)] for i in said])


class Guessing(StandIn):
    """Says a random value."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def next_tokens(self, history):
        return torch.randint(192, 256, history.shape, generator=self.generator)


class PasskeyReader(StandIn):
    """Finds the key in the whole text read so far and spells it after the question.

    Args:
        memory: Bytes from the end of the prompt that it can still see; None for all.
    """

    def __init__(self, memory=None):
        super().__init__()
        self.memory = memory

    def next_tokens(self, history):
        text = bytes(history.tolist()).decode()
        prompt, question, said = text.rpartition("What is the passkey? The passkey is")
        token = 0
        if question:
            visible = prompt if self.memory is None else prompt[-self.memory :]
            keys = re.findall(r"The passkey is (\d{5})\.", visible) or ["xxxxx"]
            token = f" {keys[0]}\n"[len(said)].encode()[0]
        return torch.full_like(history, token)


class NeedleReader(StandIn):
    """Finds all values of the asked keys of a RULER prompt in the text read so far, and says them after it.

    Args:
        most: Number of values that it says at most; None for all.
    """

    def __init__(self, most=None):
        super().__init__()
        self.most = most
        self.texts = []

    def next_tokens(self, history):
        text = bytes(history.tolist()).decode()
        self.texts.append(text)
        prompt, question, said = text.rpartition(" mentioned in the provided text ")
        token = 0
        if question:
            keys = re.split(", and |, ", prompt.rpartition(" for ")[2])
            values = [value for key in keys for value in re.findall(f"magic [a-z]+ for {key} is: ([^ .]+)\\.", prompt)]
            answer = said[:3].strip() + " " + " and ".join(values[: self.most]).upper() + "\n"
            token = answer[len(said)].encode()[0] if len(said) < len(answer) else 256
        return torch.full_like(history, token)


class LastSyllable(StandIn):
    """Learns in context: says the label that followed the last word with the query's last syllable, else ``gold``."""

    def next_tokens(self, history):
        text = bytes(history.tolist()).decode()
        following = []
        for end in range(1, len(text) + 1):
            before, mark, said = text[:end].rpartition("\nLabel:")
            query = before.rpartition("Input: ")[2][-2:]
            shown = re.findall(f"{query}\nLabel: ([a-z]+)\n\n", before)
            answer = f" {shown[-1] if shown else 'gold'}\n\n"
            following.append(answer[len(said)].encode()[0] if mark and len(said) < len(answer) else 0)
        return torch.tensor(following)

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        return output._replace(logits=50 * output.logits)  # it is sure


class MergingTokenizer(BytesTokenizer):
    """Joins two equal digits and two line ends, as a trained tokenizer joins frequent pairs; it only encodes."""

    PAIRS = tuple(2 * text for text in (b"\n", *(b"%d" % digit for digit in range(10))))

    def encode(self, text):
        found = re.findall(b"|".join(self.PAIRS) + b"|.", text.encode(), flags=re.DOTALL)
        return np.array([VOCAB + self.PAIRS.index(part) if len(part) == 2 else part[0] for part in found])

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def overflowing_model(layer, token, **changes):
    """Return a model whose layer gives NaN wherever it reads ``token``."""
    model = tiny_model(**changes)
    with torch.no_grad():
        model.trunk.embedding_table.weight[token, 0] = 1e6

    def overflow(module, inputs, output):
        hidden, state = output
        bad = inputs[0][..., :1] > 1e5
        if state is not None:
            # A recurrence keeps a value that is not finite.
            rows = bad.any(dim=1)
            state = tuple(x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), torch.nan) for x in state)
        return hidden.masked_fill(bad, torch.nan), state

    model.trunk.layers[layer].register_forward_hook(overflow)
    return model
