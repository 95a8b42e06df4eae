"""Comparisons for papers: tables of methods and budgets, random schedules."""
