"""The block-diffusion drafter: its model, its checkpoints and how it proposes tokens."""
