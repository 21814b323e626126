"""A Megatron distributed checkpoint as a Hugging Face directory: ``megatron-gspo convert`` under another name.

python tools/convert_megatron_to_hf.py runs/x/checkpoints/outer_00100 Qwen3-30B-A3B-gspo
"""

import sys

from megatron_gspo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--expect", "megatron"]))
