"""What scores a text: classifiers, reward models, judges, people, and rewards made of rewards.

How they are trained is in `supervised`.
"""
