"""A Hugging Face directory as a Megatron distributed checkpoint: ``megatron-gspo convert`` under another name.

python tools/convert_hf_to_megatron.py Qwen3-30B-A3B Qwen3-30B-A3B-megatron
"""

import sys

from megatron_gspo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--expect", "hugging-face"]))
