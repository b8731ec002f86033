"""What a user of transformers would write to get one token: MODEL, its .gguf file or "", DTYPE, PROMPT."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name, gguf, dtype, prompt = sys.argv[1:]
where = {"pretrained_model_name_or_path": name, "local_files_only": True, **({"gguf_file": gguf} if gguf else {})}
tokenizer = AutoTokenizer.from_pretrained(**where)
model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
tokens = tokenizer(prompt, return_tensors="pt")
out = model.generate(**tokens, do_sample=False, max_new_tokens=1)
print(tokenizer.decode(out[0, tokens.input_ids.shape[1] :]), flush=True)
