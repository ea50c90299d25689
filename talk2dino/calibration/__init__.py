"""Scores of different words made comparable: reference patches, rules, background, few labels."""
