"""DeepSpeed ZeRO stages 0 to 2, where one file holds the whole model: read without deepspeed or torch."""
