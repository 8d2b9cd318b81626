"""Whether a model's answer is right: teacher-forced verdicts, verdicts by generation, grading of
texts.
"""
