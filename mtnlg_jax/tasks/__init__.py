"""Text tasks (continue, summarize, translate, sentiment, answer) with answers and scores."""
