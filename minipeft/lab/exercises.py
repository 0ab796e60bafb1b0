"""Check an answer to an exercise: say what is wrong without telling what is right."""

import torch


def check(answer, expected, hint: str = "", tol: float = 1e-6) -> None:
    """Print one line: 'not attempted yet', 'not yet: ...' or 'correct'.

    expected  a number, a string, a tensor, or a function of the answer that returns "" when it is
              right and a sentence when it is not.
    """
    if answer is None:
        return print("not attempted yet")
    if callable(expected):
        problem = expected(answer)
    elif isinstance(expected, (str, bool)):
        problem = "" if answer == expected else hint or "another answer fits better"
    else:
        problem = _differs(torch.as_tensor(answer), torch.as_tensor(expected), tol, hint)
    print(f"not yet: {problem}" if problem else "correct")


def _differs(mine, right, tol, hint):
    if mine.shape != right.shape:
        return f"shape {tuple(mine.shape)}, expected {tuple(right.shape)}. {hint}".rstrip(". ")
    if not torch.allclose(mine.double(), right.double(), rtol=tol, atol=tol):
        return hint or "the shape fits, the values do not"
    return ""
