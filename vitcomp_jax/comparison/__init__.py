"""Comparisons for papers: tables of methods and budgets, and random schedules."""
