# ruff: noqa: E501
"""What lm-eval 0.4.13 makes of the rows in `task_rows`: contexts and continuations."""

PAIRS = {
    "lambada_openai": [
        [("She opened the door, and there he was, holding the", " lamp")],
        [("one  two\nthree", " four's")],
        [("", " alone")],
    ],
    "arc_easy": [
        [
            ("Question: Which gives off light?\nAnswer:", " a lamp"),
            ("Question: Which gives off light?\nAnswer:", " a stone"),
            ("Question: Which gives off light?\nAnswer:", " a spoon"),
        ],
        [
            ("Question: What do bees make?  \nAnswer:", " wax, and honey"),
            ("Question: What do bees make?  \nAnswer:", " milk"),
            ("Question: What do bees make?  \nAnswer:", " Silk"),
            ("Question: What do bees make?  \nAnswer:", " 'it''s' \"ink\""),
            ("Question: What do bees make?  \nAnswer:", " ö"),
        ],
        [
            ("Question: Ice is water that is\n{{ frozen }}\nAnswer:", " hot"),
            ("Question: Ice is water that is\n{{ frozen }}\nAnswer:", " cold"),
        ],
    ],
    "hellaswag": [
        [
            ("Removing ice: A man. scrapes a car. Then he", "  sings."),
            ("Removing ice: A man. scrapes a car. Then he", " drives off now."),
            ("Removing ice: A man. scrapes a car. Then he", "  waits"),
            ("Removing ice: A man. scrapes a car. Then he", " x"),
        ],
        [
            ("Baking: How to bake. Mix.", " Stir."),
            ("Baking: How to bake. Mix.", " Wait  long."),
            ("Baking: How to bake. Mix.", " Eat  it"),
            ("Baking: How to bake. Mix.", " Öl"),
        ],
    ],
    "piqa": [
        [
            ("Question: dry a shirt\nAnswer:", " hang it up"),
            ("Question: dry a shirt\nAnswer:", " sink it"),
        ],
        [
            ("Question: cut bread\nAnswer:", " use a spoon."),
            ("Question: cut bread\nAnswer:", " use a knife."),
        ],
    ],
    "winogrande": [
        [
            ("Ann thanked Bea because Ann", " had helped."),
            ("Ann thanked Bea because Bea", " had helped."),
        ],
        [
            ("The cup fell off the table, so the cup", " broke_d."),
            ("The cup fell off the table, so the table", " broke_d."),
        ],
    ],
    "openbookqa": [
        [("The sun is", " a star"), ("The sun is", " a moon")],
        [("Plants need ", " noise"), ("Plants need ", " light")],
    ],
    "boolq": [
        [
            ("Iron is a metal.\nQuestion: is iron a metal?\nAnswer:", " no"),
            ("Iron is a metal.\nQuestion: is iron a metal?\nAnswer:", " yes"),
        ],
        [
            ("Wood floats.\nQuestion: does wood sink?\nAnswer:", " no"),
            ("Wood floats.\nQuestion: does wood sink?\nAnswer:", " yes"),
        ],
    ],
    "copa": [
        [
            ("The tap was open therefore", "  water ran."),
            ("The tap was open therefore", "  the lamp was lit."),
        ],
        [
            ("The grass was wet because", "  it snowed ash."),
            ("The grass was wet because", "  it had rained."),
        ],
    ],
    "commonsense_qa": [
        [
            (
                "Question: Where do fish live?\n"
                "A. sand\n"
                "B. air\n"
                "C. water\n"
                "D. fire\n"
                "E. rock\n"
                "Answer:",
                " A",
            ),
            (
                "Question: Where do fish live?\n"
                "A. sand\n"
                "B. air\n"
                "C. water\n"
                "D. fire\n"
                "E. rock\n"
                "Answer:",
                " B",
            ),
            (
                "Question: Where do fish live?\n"
                "A. sand\n"
                "B. air\n"
                "C. water\n"
                "D. fire\n"
                "E. rock\n"
                "Answer:",
                " C",
            ),
            (
                "Question: Where do fish live?\n"
                "A. sand\n"
                "B. air\n"
                "C. water\n"
                "D. fire\n"
                "E. rock\n"
                "Answer:",
                " D",
            ),
            (
                "Question: Where do fish live?\n"
                "A. sand\n"
                "B. air\n"
                "C. water\n"
                "D. fire\n"
                "E. rock\n"
                "Answer:",
                " E",
            ),
        ],
        [
            (
                "Question: What is a book for?\n"
                "A. reading\n"
                "B. eating\n"
                "C. flying\n"
                "D. rain\n"
                "E. ice\n"
                "Answer:",
                " A",
            ),
            (
                "Question: What is a book for?\n"
                "A. reading\n"
                "B. eating\n"
                "C. flying\n"
                "D. rain\n"
                "E. ice\n"
                "Answer:",
                " B",
            ),
            (
                "Question: What is a book for?\n"
                "A. reading\n"
                "B. eating\n"
                "C. flying\n"
                "D. rain\n"
                "E. ice\n"
                "Answer:",
                " C",
            ),
            (
                "Question: What is a book for?\n"
                "A. reading\n"
                "B. eating\n"
                "C. flying\n"
                "D. rain\n"
                "E. ice\n"
                "Answer:",
                " D",
            ),
            (
                "Question: What is a book for?\n"
                "A. reading\n"
                "B. eating\n"
                "C. flying\n"
                "D. rain\n"
                "E. ice\n"
                "Answer:",
                " E",
            ),
        ],
    ],
    "sciq": [
        [
            ("Things fall.\nQuestion: What pulls things down?\nAnswer:", " light"),
            ("Things fall.\nQuestion: What pulls things down?\nAnswer:", " heat"),
            ("Things fall.\nQuestion: What pulls things down?\nAnswer:", " wind"),
            ("Things fall.\nQuestion: What pulls things down?\nAnswer:", " gravity"),
        ],
        [
            ("\nQuestion: What carries charge?\nAnswer:", " waves"),
            ("\nQuestion: What carries charge?\nAnswer:", " neutrons"),
            ("\nQuestion: What carries charge?\nAnswer:", " photons"),
            ("\nQuestion: What carries charge?\nAnswer:", " electrons"),
        ],
    ],
    "mmlu": [
        [
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "What is 2 + 2?\n"
                "A. 3\n"
                "B. 4\n"
                "C. 5\n"
                "D. 22\n"
                "Answer:",
                " A",
            ),
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "What is 2 + 2?\n"
                "A. 3\n"
                "B. 4\n"
                "C. 5\n"
                "D. 22\n"
                "Answer:",
                " B",
            ),
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "What is 2 + 2?\n"
                "A. 3\n"
                "B. 4\n"
                "C. 5\n"
                "D. 22\n"
                "Answer:",
                " C",
            ),
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "What is 2 + 2?\n"
                "A. 3\n"
                "B. 4\n"
                "C. 5\n"
                "D. 22\n"
                "Answer:",
                " D",
            ),
        ],
        [
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "Is 7 prime?\n"
                "A. no\n"
                "B. sometimes\n"
                "C. never\n"
                "D. yes\n"
                "Answer:",
                " A",
            ),
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "Is 7 prime?\n"
                "A. no\n"
                "B. sometimes\n"
                "C. never\n"
                "D. yes\n"
                "Answer:",
                " B",
            ),
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "Is 7 prime?\n"
                "A. no\n"
                "B. sometimes\n"
                "C. never\n"
                "D. yes\n"
                "Answer:",
                " C",
            ),
            (
                "The following are multiple choice questions (with answers) about abstract algebra.\n"
                "\n"
                "Is 7 prime?\n"
                "A. no\n"
                "B. sometimes\n"
                "C. never\n"
                "D. yes\n"
                "Answer:",
                " D",
            ),
        ],
    ],
    "gsm8k": [
        [("Question: Tom has 3 bags of 4 nuts. How many nuts?\nAnswer:", "")],
        [("Question: How much is 1,000 + 1?\nAnswer:", "")],
    ],
    "lambada_standard": [
        [("She opened the door, and there he was, holding the", " lamp")],
        [("one  two\nthree", " four's")],
        [("", " alone")],
    ],
    "arc_challenge": [
        [
            ("Question: Which gives off light?\nAnswer:", " a lamp"),
            ("Question: Which gives off light?\nAnswer:", " a stone"),
            ("Question: Which gives off light?\nAnswer:", " a spoon"),
        ],
        [
            ("Question: What do bees make?  \nAnswer:", " wax, and honey"),
            ("Question: What do bees make?  \nAnswer:", " milk"),
            ("Question: What do bees make?  \nAnswer:", " Silk"),
            ("Question: What do bees make?  \nAnswer:", " 'it''s' \"ink\""),
            ("Question: What do bees make?  \nAnswer:", " ö"),
        ],
        [
            ("Question: Ice is water that is\n{{ frozen }}\nAnswer:", " hot"),
            ("Question: Ice is water that is\n{{ frozen }}\nAnswer:", " cold"),
        ],
    ],
}
