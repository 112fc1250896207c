"""Check which names and facts are found without a model."""

from mtnlg_jax.tasks.writing.facts import find_facts

ENGLISH = (
    "The whale met Captain Ahab near Nantucket in 1851. Ahab had 40 men. They called the ship "
    'the "Pequod". "Do not go there!" Ishmael said. When Ishmael saw Captain Ahab again, he ran. '
    "Whales sing. Nobody knows why."
)
CHINESE = (
    "王小明在1998年读了《西游记》。王小明今年三十岁，李雷也来了。李雷说，这是“黑船”。"
    "王小明和李雷走了。方向不对，方法也不对。"
)


def test_english_names_numbers_and_terms():
    found = find_facts(ENGLISH, "en")
    assert found[:2] == ("Captain Ahab", "Ishmael")
    assert {"Nantucket", "1851", "40 men", "Pequod"} <= set(found)
    # What only begins a sentence is no name, and speech is no term.
    assert not {"Whales", "Nobody", "They", "The", "When", "Do", "Ahab"} & set(found)


def test_a_name_that_only_begins_sentences_counts_from_its_second_time():
    text = "Anna ran. Anna sang. Nobody saw it. Nobody cared. Bread was eaten. Bread? No bread."
    assert find_facts(text, "en") == ("Anna",)
    assert find_facts("Anna ran. She sang.", "en") == ()
    assert find_facts("We saw Dr. Watson. Bread was eaten.", "en") == ("Watson",)


def test_chinese_names_titles_and_numbers():
    found = find_facts(CHINESE, "zh")
    assert found[:2] == ("王小明", "李雷")
    assert {"《西游记》", "黑船", "1998年", "三十岁"} <= set(found)
    # One occurrence of 方向 and 方法 each: not names.
    assert not any(entry.startswith("方") for entry in found) and "王小" not in found


def test_a_table_is_bounded_and_stable():
    many = " ".join(f"he met Name{chr(97 + i)} there," for i in range(26)).replace("Name", "Na")
    found = find_facts(many, "en", most=5)
    assert found == ("Naa", "Nab", "Nac", "Nad", "Nae")
    assert find_facts("", "en") == find_facts("", "zh") == ()
