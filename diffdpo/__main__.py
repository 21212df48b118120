"""`python -m diffdpo COMMAND`, also for launchers: `torchrun -m diffdpo train`, `deepspeed --module diffdpo train`."""

from diffdpo.cli.main import entry

if __name__ == "__main__":
    entry()
