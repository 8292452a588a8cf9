"""evalplus' own verdicts: reads [[task id, program], ...] as JSON; its last line is [[base, base and plus], ...]."""

import json
import sys

from evalplus.data import get_human_eval_plus, get_mbpp_plus
from evalplus.eval import PASS
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
from evalplus.evaluate import check_correctness, get_groundtruth

verdicts = []
solutions = json.load(sys.stdin)
wanted = {task_id for task_id, _ in solutions}
problems, expected = {}, {}
for name, load, not_none in (
    ("humaneval", get_human_eval_plus, []),
    ("mbpp", get_mbpp_plus, MBPP_OUTPUT_NOT_NONE_TASKS),
):
    chosen = {task_id: problem for task_id, problem in load().items() if task_id in wanted}
    expected |= get_groundtruth(chosen, name, not_none)
    problems |= {task_id: (name, problem) for task_id, problem in chosen.items()}
for task_id, program in solutions:
    dataset, problem = problems[task_id]
    result = check_correctness(dataset, 0, problem, program, expected[task_id], fast_check=True)
    base, plus = (result[group][0] == PASS for group in ("base", "plus"))
    verdicts.append([base, base and plus])
print(json.dumps(verdicts))
