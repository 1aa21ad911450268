"""`python -m fmaq`, the form that launchers take: `torchrun --nproc-per-node 2 -m fmaq finetune recipe.yaml`."""

from fmaq.cli import main

main()
