"""Checkpoints as Trainer with DeepSpeed leaves them, of transformers' own Mamba2; started by torchrun on two ranks.

    train_trainers.py OUT

writes OUT/{gathered,stage2,frozen}/checkpoint-2. ``Trainer._save_checkpoint`` does these steps: gather the weights,
``save_pretrained`` them with config and tokenizer, then ``DeepSpeedEngine.save_checkpoint`` into the same directory.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from datetime import timedelta

import deepspeed
import deepspeed.ops
import torch
from tokenizers import Tokenizer, models
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerFast

CONFIG = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 6},
    **{"n_groups": 1, "chunk_size": 8, "tie_word_embeddings": True, "use_cache": False},
    **{"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2},
}


def start(stage: int, *, frozen: bool):
    """Train two steps and return model and engine."""
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**CONFIG))
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in ("backbone.norm_f.weight", "backbone.layers.1.mixer.out_proj.weight"))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {
            **{"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "stage3_param_persistence_threshold": 0,
        },
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(2):
        ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return model, engine


def save(directory: Path, stage: int, *, frozen: bool = False) -> None:
    """Write what Trainer writes at a checkpoint."""
    model, engine = start(stage, frozen=frozen)
    gathered = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(directory, state_dict=gathered)
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(directory)
        (directory / "trainer_state.json").write_text('{"global_step": 2}')
    torch.distributed.barrier()
    engine.save_checkpoint(str(directory), exclude_frozen_parameters=frozen)
    engine.destroy()


def main(out: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a JIT build of two minutes
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    save(out / "gathered/checkpoint-2", 3)
    save(out / "stage2/checkpoint-2", 2)
    save(out / "frozen/checkpoint-2", 3, frozen=True)
    torch.distributed.destroy_process_group()
    # torch's communication threads sometimes abort a rank that ends while its peers do; all is done by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
