"""`python -m tithe`, the command line: for `torchrun --nproc-per-node 2 -m tithe train RECIPE.toml`."""

from tithe.app.cli import app

if __name__ == "__main__":
    app()
