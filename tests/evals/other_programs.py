"""Programs other than the canonical one, right and wrong in telling ways, by problem."""

PROGRAMS = {
    "HumanEval/0": ["def has_close_elements(numbers, threshold): return False"],
    "HumanEval/2": [
        "def truncate_number(number): return number % 1",
        "def truncate_number(number): return round(number % 1, 3)",
        "def truncate_number(number): return number % 1 + 1e-9",
        "def truncate_number(number): return int(number)",
    ],
    "HumanEval/34": [
        "def unique(l): return sorted(set(l))",
        "def unique(l): return tuple(sorted(set(l)))",
        "def unique(l): return set(l)",
    ],
    "HumanEval/50": ["def decode_shift(s): return ''.join(chr((ord(c) - 5 - 97) % 26 + 97) for c in s)"],
    "Mbpp/2": [
        "def similar_elements(a, b): return [x for x in a if x in b]",
        "def similar_elements(a, b): return a",
    ],
    "Mbpp/88": [
        "from collections import Counter\ndef freq_count(l): return Counter(l)",
        "def freq_count(l): return {x: l.count(x) for x in l}",
        "def freq_count(l): return {x: 1 for x in l}",
    ],
    "Mbpp/558": [
        """
def digit_distance_nums(a, b):
    a, b = str(a), str(b)
    n = max(len(a), len(b))
    return sum(abs(int(x) - int(y)) for x, y in zip(a.zfill(n), b.zfill(n)))
""",
        "def digit_distance_nums(a, b): return abs(a - b)",
    ],
    "Mbpp/581": [
        "def surface_Area(b, h): return round(b * b + 2 * b * (b * b / 4 + h * h) ** 0.5)",
        "def surface_Area(b, h): return b * h",
    ],
    "Mbpp/737": [
        "def check_str(s): return bool(s) and s[0] in 'aeiouAEIOU' or None",
        "def check_str(s): return True",
    ],
    "Mbpp/790": [
        "def even_position(nums): return all(n % 2 == i % 2 for i, n in enumerate(nums))",
        "def even_position(nums): return 1",
        "def even_position(nums): raise SystemExit",
        "def even_position(nums:",
    ],
}
