"""`python -m vicinal`: the command line."""

from vicinal.cli import app

if __name__ == "__main__":
    app(prog_name="vicinal")
