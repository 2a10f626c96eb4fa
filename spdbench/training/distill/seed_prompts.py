"""Seed prompts: beginnings of user turns that the model continues, so that a small model asks for many things.

None ends in a space, which would be a token of its own. A share of turns has none.
"""

from __future__ import annotations

GROUPS: dict[str, tuple[tuple[str, ...], int]] = {
    "general": ((
        "How do I", "How can", "What is", "What are", "Why does", "Why is", "When should", "Where can", "Which of",
        "Can you explain", "Explain", "Describe", "Tell me about", "Give me", "List five", "I need advice on",
        "Compare", "What happens if", "Is it true that", "Help me",
    ), 4),
    "writing": ((
        "Write a", "Write a short story about", "Write an email to", "Write a poem about", "Compose a",
        "Draft a letter to", "Rewrite this sentence", "Summarize the following paragraph:", "Edit the following text:",
        "Write a product description for", "Come up with a title for", "Create a plan for", "Write a speech",
    ), 3),
    "roleplay": ((
        "Pretend you are", "Imagine that you are", "You are a", "Act as a", "Suppose you were",
        "Let's play a game where",
    ), 1),
    "reasoning": ((
        "If all", "Five friends are standing", "In a race,", "Which word does not belong:", "There are three boxes.",
        "Solve this riddle:", "Is the following argument valid?", "A man walks", "Anna is older than",
    ), 2),
    "maths": ((
        "A farmer has", "A baker makes", "A train travels", "A shop sells", "Maria buys", "Tom has", "A class of",
        "Sam earns", "There are 24", "A tank holds", "Lena reads", "In a garden there are", "A bus can carry",
        "Each box holds", "Ben is twice as old as", "A recipe calls for", "Nora saves", "A box of pencils costs",
        "On Monday, a library", "Two friends share", "A worker is paid", "A rectangle has", "Solve for x:",
        "Calculate", "What is 15% of", "A school orders", "Every week, Omar", "If 3 apples cost", "Jill runs",
        "A factory makes",
    ), 5),
    "code": ((
        "def", "def count_", "def find_", "def is_", "def sum_", "def remove_", "def get_", "def merge_",
        "def reverse_",
        "Complete this Python function:\n\ndef", "Complete this Python function:\n\ndef max_",
        "Complete this Python function:\n\ndef is_", "Complete this Python function:\n\ndef count_",
        "from typing import List\n\n\ndef", "from typing import List\n\n\ndef filter_",
        "from typing import List\n\n\ndef sort_", "import math\n\n\ndef",
        "Write a Python function", "Write a Python function that takes a list of", "Write a program that",
        "Write a function that checks whether", "Fix the bug in this code:\n\ndef", "What does this code do?\n\nfor",
        "Write an SQL query that", "Write a JavaScript function", "Write a class",
    ), 5),
    "extraction": ((
        "Extract the names and dates from this text:", "Read the paragraph below and answer the question.",
        "Classify each of these reviews as positive or negative:", "List all the places mentioned here:",
        "Turn this text into a table:", "Given the following data,",
    ), 1),
    "science": ((
        "How does a", "What causes", "Explain the difference between", "In physics,", "In chemistry,",
        "Describe how plants", "What is the role of", "How do vaccines",
    ), 2),
    "humanities": ((
        "Discuss", "Who was", "What were the causes of", "How did the", "What is the meaning of", "In economics,",
        "Describe the history of", "Share ideas for teaching",
    ), 2),
    "translation": ((
        "Translate the following sentence into French:", "Translate this to Spanish:", "How do you say",
        "Translate into German:", "Translate to English:",
    ), 1),
    "none": (("",), 4),
}  # fmt: skip
"""Seed prompts by topic, and how often each topic is drawn."""

LONGEST_PROMPT = max((prompt for prompts, _ in GROUPS.values() for prompt in prompts), key=len)
