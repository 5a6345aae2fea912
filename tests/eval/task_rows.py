"""Rows of each task by the hub's schema, made up for tests, and a mirror that holds them.

What lm-eval makes of these rows is in `task_texts`.
"""

import pyarrow as pa
import pyarrow.parquet as pq

from summerlm.eval.task import load_task

ARC = [
    {
        "id": "A1",
        "question": "Which gives off light?",
        "choices": {"text": ["a lamp", "a stone", "a spoon"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "A2",
        "question": "What do bees make?  ",
        "choices": {
            "text": ["wax, and honey", "milk", "Silk", "'it''s' \"ink\"", "ö"],
            "label": ["1", "2", "3", "4", "5"],
        },
        "answerKey": "5",
    },
    {
        "id": "A3",
        "question": "Ice is water that is\n{{ frozen }}",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": "B",
    },
]
ROWS = {
    "lambada_openai": [
        {"text": "She opened the door, and there he was, holding the lamp"},
        {"text": "one  two\nthree four's"},
        {"text": "alone"},
    ],
    "arc_easy": ARC,
    "hellaswag": [
        {
            "ind": 7,
            "activity_label": "Removing ice",
            "ctx_a": "A man [title] scrapes a car.",
            "ctx_b": "then HE",
            "ctx": "",
            "endings": [" [title] sings.", "drives  off [step] now. ", "[substeps] waits", "x"],
            "source_id": "activitynet~v_1",
            "split": "val",
            "split_type": "indomain",
            "label": "2",
        },
        {
            "ind": 8,
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Mix.",
            "ctx_b": "",
            "ctx": "",
            "endings": ["Stir.", "Wait [a]  [b] long.", "Eat   it", "Öl"],
            "source_id": "wikihow~1",
            "split": "val",
            "split_type": "zeroshot",
            "label": "0",
        },
    ],
    "piqa": [
        {"goal": "dry a shirt", "sol1": "hang it up", "sol2": "sink it", "label": 0},
        {"goal": "cut bread", "sol1": "use a spoon.", "sol2": "use a knife.", "label": 1},
    ],
    "winogrande": [
        {
            "sentence": "Ann thanked Bea because _ had helped.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "2",
        },
        {
            "sentence": "The cup fell off the table, so _  broke_d.",
            "option1": "the cup",
            "option2": "the table",
            "answer": "1",
        },
    ],
    "openbookqa": [
        {
            "id": "7-1",
            "question_stem": "The sun is",
            "choices": {"text": ["a star", "a moon"], "label": ["A", "B"]},
            "answerKey": " A",
        },
        {
            "id": "7-2",
            "question_stem": "Plants need ",
            "choices": {"text": ["noise", "light"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ],
    "boolq": [
        {"passage": "Iron is a metal.", "question": "is iron a metal", "idx": 0, "label": 1},
        {"passage": "Wood floats.", "question": "does wood sink", "idx": 1, "label": 0},
    ],
    "copa": [
        {
            "premise": "The tap was open. ",
            "choice1": "Water ran.",
            "choice2": "The lamp was lit.",
            "question": "effect",
            "idx": 0,
            "label": 0,
        },
        {
            "premise": "The grass was wet.",
            "choice1": "It snowed ash.",
            "choice2": "It had rained.",
            "question": "cause",
            "idx": 1,
            "label": 1,
        },
    ],
    "commonsense_qa": [
        {
            "id": "c1",
            "question": " Where do fish live? ",
            "question_concept": "fish",
            "choices": {
                "label": ["A", "B", "C", "D", "E"],
                "text": ["sand", "air", "water", "fire", "rock"],
            },
            "answerKey": "C",
        },
        {
            "id": "c2",
            "question": "What is a book for?",
            "question_concept": "book",
            "choices": {
                "label": ["A", "B", "C", "D", "E"],
                "text": ["reading", "eating", "flying", "rain", "ice"],
            },
            "answerKey": "A",
        },
    ],
    "sciq": [
        {
            "question": "What pulls things down?",
            "distractor3": "wind",
            "distractor1": "light",
            "distractor2": "heat",
            "correct_answer": "gravity",
            "support": "  Things fall.",
        },
        {
            "question": "What carries charge?",
            "distractor3": "photons",
            "distractor1": "waves",
            "distractor2": "neutrons",
            "correct_answer": "electrons",
            "support": "",
        },
    ],
    "mmlu": [
        {
            "question": " What is 2 + 2? ",
            "subject": "abstract_algebra",
            "choices": ["3", "4", "5", "22"],
            "answer": 1,
        },
        {
            "question": "Is 7 prime?",
            "subject": "abstract_algebra",
            "choices": ["no", "sometimes", "never", "yes"],
            "answer": 3,
        },
    ],
    "gsm8k": [
        {
            "question": "Tom has 3 bags of 4 nuts. How many nuts?",
            "answer": "He has 3*4=<<3*4=12>>12 nuts.\n#### 12",
        },
        {"question": "How much is 1,000 + 1?", "answer": "1,000 + 1 = 1,001.\n#### 1,001"},
    ],
}
ROWS["lambada_standard"] = ROWS["lambada_openai"]
ROWS["arc_challenge"] = ARC


def write_mirror(folder, name, few_shot=()):
    """Write a task's rows, and rows for its examples, as a mirror of the hub holds them."""
    task = load_task(name)
    splits = {task.data.split: ROWS["mmlu" if name.startswith("mmlu") else name]}
    if few_shot:
        splits[task.few_shot.split] = list(few_shot)
    below = (task.data.folder or "data").format(part=task.part_names[0])
    for split, rows in splits.items():
        path = folder / task.data.repository / below / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    return folder
