"""Prints the folder of the suite's tasks for lm-eval's --include_path."""

from evals.lmeval import TASKS_DIR

if __name__ == "__main__":
    print(TASKS_DIR)
