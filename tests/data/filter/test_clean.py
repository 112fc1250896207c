import json
import pickle
import random
import unicodedata

import ftfy
import pytest

from mtnlg_jax.data.filter import clean as module
from mtnlg_jax.data.filter import pii
from mtnlg_jax.data.filter.boilerplate import remove_boilerplate
from mtnlg_jax.data.filter.clean import CHANGES, DROPS, CleanConfig, clean, identify
from mtnlg_jax.data.filter.repetition import Units, duplicate_share
from mtnlg_jax.data.read.documents import read_documents

ENGLISH = """\
The harbour of the old town had been built by merchants who wanted a shelter for their ships, and \
over the years it
grew into a place where people from every country met. In the morning the boats came back with \
fish, and the market
that stood behind the customs house was full of voices. Nobody could say who had put up the first \
stall, but everyone
knew that the best bread was sold by a woman with a red scarf, who was never seen without her dog.

When the railway came, most of the trade moved to the city, and the warehouses were left to the \
gulls. A few families
stayed. They repaired nets, painted the boats that were still used, and told the children stories \
of storms which they
had not seen themselves. One of those children became a painter, and his pictures of the harbour \
hang in a museum today,
where visitors stop in front of them and ask whether such a place ever existed.
"""
CHINESE = """\
老城的港口是由商人们修建的，他们希望为自己的船只找到一个避风的地方。许多年过去了，这里渐渐成了各国人相遇的场所。清晨，渔船满载而归，\
海关大楼后面的集市上人声鼎沸。谁也说不清第一个摊位是什么时候搭起来的，但是大家都知道，最好的面包是一位戴红头巾的妇人卖的，她的狗总是跟在身边。

铁路修通以后，大部分贸易转移到了城里，仓库便留给了海鸥。只有几户人家留了下来，他们修补渔网，粉刷还在使用的小船，给孩子们讲述自己也没有亲眼见过的风暴。\
其中一个孩子后来成了画家，他画的港口如今挂在博物馆里，参观的人常常停下脚步，问这样的地方是否真的存在过。
"""
ANY = CleanConfig(languages=(), min_tokens=0)
KEEP = dict(
    languages=(),
    min_tokens=0,
    word_length=(0, 1e9),
    max_symbol_ratio=1,
    min_letter_words=0,
    max_bullet_lines=1,
    max_ellipsis_lines=1,
    min_stop_words=0,
    duplicate_lines=1,
    duplicate_line_characters=1,
    duplicate_paragraphs=1,
    duplicate_paragraph_characters=1,
    top_ngrams=(),
    duplicate_ngrams=(),
)
CHANGE_ONLY = CleanConfig(**KEEP, max_replacement_share=1)


def changed(text):
    result = clean(text, CHANGE_ONLY)
    assert result.dropped is None
    return result.text, result.counts


def test_good_text_is_unchanged():
    for text, language in ((ENGLISH, "en"), (CHINESE, "zh")):
        result = clean(text, CleanConfig(languages=(language,)))
        assert (result.text, result.dropped, result.counts, result.language) == (
            text,
            None,
            {},
            language,
        )
        assert clean(text, CleanConfig(languages=("de", "fr"))).dropped == "language"
    assert pickle.loads(pickle.dumps(result)) == result
    assert pickle.loads(pickle.dumps(CleanConfig())) == CleanConfig()


@pytest.mark.parametrize(
    "text, repaired",
    [
        ("schÃ¶n und grÃ¼n", "schön und grün"),
        ("It&rsquo;s &lt;b&gt; &amp; more", "It’s <b> & more"),
        ("if a < b &amp;&amp; c", "if a < b &amp;&amp; c"),  # code keeps its entities
        ("eﬃcient ﬂow", "efficient flow"),
        ("cafe\u0301", "café"),
        ("“curly” ‘quotes’ stay", "“curly” ‘quotes’ stay"),
        ("他说：“好的，（真的）！”　ＡＢＣ", "他说：“好的，（真的）！”　ＡＢＣ"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("\x1b[31mred\x1b[0m \x07bell", "red bell"),
        ("half \ud83d pair \ud83d\ude00", "half \ufffd pair \U0001f600"),
        ("ä¸\xadæ–‡", "中文"),
        ("page one\fpage two", "page one\npage two"),
        ("a\x1fb\x81c", "a bc"),
        ("co\xadop", "coop"),
        ("\ufff9漢\ufffaかん\ufffb字", "漢(かん)字"),
        # Correct texts that look like damage.
        ("10³ cells, 5½ m², ㎏ ℃ Ⅷ ①", "10³ cells, 5½ m², ㎏ ℃ Ⅷ ①"),
        ("d×² and 2×³√2", "d×² and 2×³√2"),
        ("Ã is A with a tilde", "Ã is A with a tilde"),
        ("Â m nhạc Việt", "Â m nhạc Việt"),
        ("the ligature ﬁ (U+FB01), ǆ and ĳ", "the ligature ﬁ (U+FB01), ǆ and ĳ"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
        ("∂²u/∂t² = c²∇²u ± σ²", "∂²u/∂t² = c²∇²u ± σ²"),
    ],
)
def test_unicode_is_repaired(text, repaired):
    assert changed(text)[0] == repaired
    assert (changed(text)[1].get("unicode", 0) > 0) == (text != repaired)


@pytest.mark.parametrize(
    "text, repaired",
    [
        ("Johnson &amp; Johnson met at 5 &gt; 3", "Johnson & Johnson met at 5 > 3"),
        ("caf&eacute; &ndash; it&#8217;s &quot;open&quot;", 'café – it’s "open"'),
        ("他说：&ldquo;好&rdquo;&hellip;", "他说：“好”…"),
        ("I &lt;3 you", "I <3 you"),
        ("&hearts; &rarr; R&amp;D; done", "♥ → R&D; done"),
        ("&ldquo;Rock &amp; Roll&rdquo; by the band", "“Rock & Roll” by the band"),
    ],
)
def test_leftover_entities_are_resolved(text, repaired):
    assert changed(text)[0] == repaired
    assert changed(f"A line & another.\n{text}")[0] == f"A line & another.\n{repaired}"


@pytest.mark.parametrize(
    "text",
    [
        "To show a tag in HTML, write &lt;b&gt; and not the tag; "
        "for an ampersand write &amp;amp; there.",
        "    s = s.replace(\"'\", '&#39;').replace('&', '&amp;')",
        "Write &lt;b&gt; for bold text.",
        "Convert '&amp;', '&lt;', and '&gt;' to the characters.",
        "text &amp;amp;lt; twice",
        "if a &lt; b &amp;&amp; c",
        "x = y &amp; mask;",
        "ptr-&gt;next",
        'href="?a=1&amp;b=2"',
        "The entity &eacute; is e with an accent.",
        "用转义字符 &lt; 表示小于号",
        "&amp;nbsp; and &amp;lt;",
        "Type `&copy;` for the sign.",
        "\tlabel = R &amp; D",
        "an a < b and an &lt; in one text",
        "first <b>bold</b>\nand then R&amp;D and &lt;",
        "```\nR &amp; D\n```",
        "the “&quot;” sign",
    ],
)
def test_entities_in_texts_about_html_are_kept(text):
    assert changed(text) == (text, {})


def test_normalization_can_be_disabled():
    config = CleanConfig(**KEEP, normalization="none")
    assert (
        clean("cafe\u0301 eﬃcient &amp; sch\u00c3\u00b6n Å", config).text
        == "cafe\u0301 efficient & schön Å"
    )


def test_nfkc_on_request():
    config = CleanConfig(**KEEP, normalization="NFKC")
    assert clean("10³ H₂O ½，Ａ", config).text == "10³ H₂O ½,A"
    assert clean("全角，ＡＢＣ！①", CleanConfig(**KEEP, normalization="NFKC")).text == "全角,ABC!1"
    kept = clean(
        "schÃ¶n &amp; half \ud83d", CleanConfig(**KEEP, max_replacement_share=1, repair=False)
    ).text
    assert kept == "schÃ¶n &amp; half \ufffd"


SCRIPTS = [
    "abc XYZ.,'\"&;<>#-",
    "&amp;&lt;&#60;&eacute;",
    "\n\n \t",
    "0123456789 .-@+",
    "éèüßñçøØåÅÃÂÎÐÙœŒžŠ",
    "\u0301\u0308\u0327\u20dd\u0e31\u05b8",
    "αβγΩάήώ",
    "жыЯЁвЂ",
    "“”‘’—–…„‚«»",
    "中文版权所有字，。：（）",
    "かなカナｶﾅ",
    "한국어각",
    "עברית",
    "عربي",
    "हिन्दी",
    "ไทย",
    "😀👩\u200d👩\u200d👧🏳\ufe0f\u200d🌈",
    "\ud83d\ude00\udcff\ud800",
    "\x00\x07\x1b[0m\x7f\x80\x85\x9f\xa0\xad",
    "ﬁﬃĳŉǆ",
    "€£¥™©®°²½×÷¬¤¦",
    "\u2028\u2029\ufeff\ufffd\ufffe\u200b\u202e",
    "\U00020000\U0003134a\U000e0041\U0010ffff",
    "―√≈║█┌☃♥",
]


def random_texts(seed, count, longest=60):
    draw = random.Random(seed)
    for _ in range(count):
        scripts = draw.sample(SCRIPTS, draw.randint(1, 4))
        text = "".join(draw.choice(draw.choice(scripts)) for _ in range(draw.randint(0, longest)))
        if draw.random() < 0.3:  # mojibake as it occurs
            text = text.encode("utf-8", "replace").decode(
                draw.choice(["latin-1", "cp1252", "cp1251"]), "replace"
            )
        if draw.random() < 0.1:
            text = "".join(chr(draw.randrange(0x110000)) for _ in range(20)) + text
        yield text


def test_cleaning_any_string_is_valid_and_idempotent():
    for text in random_texts(1, 3000):
        for config in (CHANGE_ONLY, ANY):
            once = clean(text, config)
            if once.text is None:
                assert once.dropped in DROPS
                continue
            once.text.encode()
            assert len(once.text) <= 3 * len(text) and once.counts.keys() <= set(CHANGES)
            again = clean(once.text, config)
            assert (again.text, again.counts) == (once.text, {}), text
            assert unicodedata.is_normalized("NFC", once.text)


def test_only_lines_that_ftfy_leaves_unchanged_are_skipped():
    touched = 0
    for text in random_texts(2, 6000, longest=24):
        text = unicodedata.normalize("NFC", text.replace("\r", ""))
        escaped = not module.entities.writes_both(text)
        lines = [module._repair_line(line, CHANGE_ONLY, escaped) for line in text.split("\n")]
        assert module._repair(text, CHANGE_ONLY)[0] == "\n".join(lines)
        touched += lines != text.split("\n")
    assert touched > 1000
    ascii_only = "".join(map(chr, range(32, 127))) * 2
    assert module._repair(ascii_only, CHANGE_ONLY) == (ascii_only, 0)


def test_ftfy_repairs_no_skipped_pair_of_characters():
    from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES

    characters = sorted(
        {
            character
            for character in map(chr, range(0x80, 0x3000))
            if character in BADNESS_RE.pattern
        }
        | set("".join(MOJIBAKE_CATEGORIES.values())) - set("-\\x")
    )
    for first in characters:
        for second in characters:
            for text in (f"a{first}{second} b", f"{first} {second}"):
                if BADNESS_RE.search(text) and not module._SUSPECT.search(text):
                    assert module._repair(text, CHANGE_ONLY)[0] == ftfy.fix_encoding(text), text


NOTICES = """\
We use cookies to improve your experience. By continuing you agree to our use of cookies.
This website uses cookies.
Accept all cookies
Please enable JavaScript to view the comments powered by Disqus.
JavaScript is disabled in your browser.
Share this article
Share on Facebook
Share on Facebook, Twitter or E-Mail
Follow us on Instagram
© 2019 Harbour News Ltd. All rights reserved.
Sign up for our weekly newsletter
Skip to main content
Read more »
[Advertisement]
Home | About us | Contact | Privacy Policy | Terms of Use
Powered by WordPress
Click here to subscribe to our feed
版权所有 © 2008-2020 某某网
京ICP备12345678号-1
京公网安备 11010802012345号
点击查看更多
>>点击这里查看全文
分享到：微信 微博 QQ空间
扫一扫下方二维码，关注我们
更多内容请关注微信公众号：某某
责任编辑：王某
未经授权不得转载
转载请注明出处
首页 | 联系我们 | 网站地图
上一篇：旧新闻的标题
下一页
请启用JavaScript
本网站使用Cookie，继续浏览即表示同意
【广告】
Our site uses cookies and similar technologies to analyse traffic.
By using this website you agree to the use of cookies.
Please enable cookies in your browser.
Manage cookie preferences
You need to enable JavaScript to run this app.
Your browser does not support JavaScript.
This page requires JavaScript.
JavaScript must be enabled in your browser to use this form.
Subscribe to our newsletter and never miss a story.
Copyright 2011 by the Harbour Society. All rights reserved. Terms apply.
All Rights Reserved.
Proudly powered by WordPress
请在浏览器中启用Cookie
您的浏览器不支持JavaScript
版权所有，侵权必究
欢迎关注官方微信公众号：海港
请点击下载全文
微信扫一扫关注我们
长按二维码关注我们
Please accept cookies to continue.
Your browser has cookies disabled.
Cookies help us deliver our services.
You can change your cookie settings at any time.
You must have JavaScript enabled to use this form.
We're sorry but this app doesn't work without JavaScript.
Join our newsletter
Share this post on Facebook and Twitter""".split("\n")
PROSE = """\
Cookies are small files that a site leaves in a browser; the committee asked how long they may \
stay there.
JavaScript is a language that was made in ten days in 1995.
The program needs no JavaScript to run.
Share your bread with those who have none.
He asked them to share on equal terms.
All the rights that were reserved to the king passed to the people.
The newsletter of the society appeared every month until 1914.
Read more slowly, said the teacher.
Home is where the heart is
Privacy
他点击查看按钮以后，屏幕上出现了一张地图，上面标着所有的港口。
这位编辑先生：一个很有耐心的人，在报社里工作了三十年，从来没有迟到过。
他扫了一眼桌上的信。
诗人把手稿分享给了朋友们。
他收藏了许多古画，却没有登录过任何网站。
下一章我们再说这件事。
这本书的转载权属于他的儿子。
Allow the cookies to cool on the tray before you ice them.
It takes two people using chocolate cookies as bricks to build the house.
For the crust we use cookies.
We use cookies from the shop next door, crushed with butter.
Our cookie recipe came from a neighbour.
A browser stores cookies for each site and sends them back with every request.
The children accept cookies from anybody.
If JavaScript is disabled, the <noscript> element is shown instead.
JavaScript is not supported by text browsers such as Lynx.
The page requires JavaScript only for its map.
To enable JavaScript engines to inline the call, keep the function small.
They had to register before the newsletter of the party was printed.
She would subscribe to any newsletter that spoke of birds.
In 1776 all rights reserved to the Crown were ended.
The copyright page said all rights reserved, and he laughed.
Under the treaty, all rights reserved by the states remain with them.
Powered by WordPress, the blog ran for ten years without a fault.
The placeholder text begins with lorem ipsum dolor sit amet.
Nobody reads the terms of use before clicking the button.
They followed us on foot to the harbour.
Subscribers pay in advance; the terms are printed on the back.
Click the red button, and the door opens.
这本书的版权所有人是他的儿子。
在中国办网站需要申请ICP备案。
公网安备平台由公安部门管理。
用户点击更多按钮后，列表会展开。
他把照片分享到朋友圈，很快就有人留言。
顾客扫描二维码付款，店主在门口收钱。
越来越多的人关注这家医院的公众号。
编辑：你来晚了。
未经主人同意，他使用了那把伞。
他转载时注明了作者。
法院判决该网站不得转载他的文章。
浏览器会把Cookie保存在本地文件中。
早期的手机不支持JavaScript。
The law requires consent before cookies are set on a device.
Our cookies are baked fresh every morning in a wood oven.
JavaScript is required reading for anyone who builds pages.
If your users disable JavaScript, render on the server.
You should subscribe to a newsletter in your field, his teacher said.
The phrase "all rights reserved" first appeared in a treaty of 1910.
Share the bread on the table.
很多网站使用Cookie来识别用户。
本站是铁路的终点站，旅客请在此下车。""".split("\n")


@pytest.mark.parametrize("line", NOTICES)
def test_boilerplate_lines_are_removed(line):
    assert remove_boilerplate(f"Before.\n{line}\nAfter.") == ("Before.\nAfter.", 1)
    assert clean(f"{ENGLISH}{line}\n{ENGLISH[:9]}", ANY).counts["boilerplate"] == 1


@pytest.mark.parametrize("line", PROSE)
def test_prose_about_boilerplate_is_kept(line):
    assert remove_boilerplate(f"Before.\n{line}\nAfter.")[1] == 0
    assert remove_boilerplate(line.ljust(100) + NOTICES[0] * 3)[1] == 0  # a long line


CHECKED = "11010519491231002X"  # the example of GB 11643


@pytest.mark.parametrize(
    "text, masked",
    [
        ("mail jo.do+x@mail.example.co.uk now", "mail <EMAIL> now"),
        ("邮箱abc_1@qq.com，谢谢", "邮箱<EMAIL>，谢谢"),
        ("手机：13812345678。", "手机：<PHONE>。"),
        ("手机+86 138-1234-5678转", "手机<PHONE>转"),
        ("电话 010-62345678，(021) 6123-4567", "电话 <PHONE>，<PHONE>"),
        ("热线400-820-8820", "热线<PHONE>"),
        (
            "call (212) 555-0123 or 212-555-0123, +1 212.555.0123",
            "call <PHONE> or <PHONE>, <PHONE>",
        ),
        ("Tel. +44 20 7946 0958 or +49 (30) 901820", "Tel. <PHONE> or <PHONE>"),
        (
            "card 4111 1111 1111 1111, 5500-0000-0000-0004 and 378282246310005",
            "card <CARD_NUMBER>, <CARD_NUMBER> and <CARD_NUMBER>",
        ),
        ("银联6222021234567894", "银联<CARD_NUMBER>"),
        (f"身份证{CHECKED}号", "身份证<CHINESE_ID>号"),
        (f"ID {CHECKED.lower()}.", "ID <CHINESE_ID>."),
        ("SSN 078-05-1120", "SSN <US_SSN>"),
        (
            "from 203.0.114.77 and http://93.184.216.34/x",
            "from <IP_ADDRESS> and http://<IP_ADDRESS>/x",
        ),
        ("host 2a00:1450:4001:81b::200e.", "host <IP_ADDRESS>."),
        ("AKIAIOSFODNN7EXAMPLE", "<API_KEY>"),
        ("token=ghp_" + "aB3" * 12, "token=<API_KEY>"),
        ("sk-proj-Ab1" + "x9Y" * 10, "<API_KEY>"),
        ("AIza" + "a1B2c" * 7, "<API_KEY>"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF123_-x", "<API_KEY>"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc+/=\n"
            "-----END RSA PRIVATE KEY-----\nend",
            "<PRIVATE_KEY>\nend",
        ),
        (
            "> -----BEGIN PRIVATE KEY-----\n> MIIEpAIBAAKCAQEAxyz0\n"
            "> abcdefghijklmnopqrst\n> so it was",
            "> <PRIVATE_KEY>\n> so it was",
        ),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
            "DEK-Info: AES-128-CBC,0A\n\nMIIE\n-----END RSA PRIVATE KEY-----\nend",
            "<PRIVATE_KEY>\nend",
        ),
        (
            r'key = "-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQEAxyz0\nabcdefghijklmnopqrst"',
            'key = "<PRIVATE_KEY>"',
        ),
        # Next to any punctuation, in rows, lists and queries.
        (
            "Call 13812345678,13987654321 or 010-62345678/62345679.",
            "Call <PHONE>,<PHONE> or <PHONE>/<PHONE>.",
        ),
        (
            f"Li Lei,13812345678,{CHECKED},4111111111111111",
            "Li Lei,<PHONE>,<CHINESE_ID>,<CARD_NUMBER>",
        ),
        (
            f"ssn 078-05-1120,219-09-9999; tel=13812345678&id={CHECKED}",
            "ssn <US_SSN>,<US_SSN>; tel=<PHONE>&id=<CHINESE_ID>",
        ),
        ("-user@ex.org 电话-13812345678", "-<EMAIL> 电话-<PHONE>"),
        ("|张三|13812345678|a@b.cn|", "|张三|<PHONE>|<EMAIL>|"),
        ("张三/13812345678/北京", "张三/<PHONE>/北京"),
        ("{\"phone\":\"13812345678\",'m':'a@b.cn'}", "{\"phone\":\"<PHONE>\",'m':'<EMAIL>'}"),
        ("**13812345678** _078-05-1120_ `a@b.org`", "**<PHONE>** _<US_SSN>_ `<EMAIL>`"),
        ("Ann\t+44 20 7946 0958\t203.0.114.77", "Ann\t<PHONE>\t<IP_ADDRESS>"),
        ("https://x.org/?tel=13812345678&mail=a@b.org", "https://x.org/?tel=<PHONE>&mail=<EMAIL>"),
        # Other scripts and forms of the same digits and marks.
        ("电话：１３８１２３４５６７８，邮箱ａｂｃ＠ｑｑ．ｃｏｍ", "电话：<PHONE>，邮箱<EMAIL>"),
        ("هاتف ٠٠٨٦١٣٨١٢٣٤٥٦٧٨ و +٩٦٦ ٥٠ ١٢٣ ٤٥٦٧", "هاتف <PHONE> و <PHONE>"),
        ("फ़ोन +९१ ९८७६५ ४३२१०", "फ़ोन <PHONE>"),
        (
            "138–1234–5678, 078‑05‑1120, 4111\u20091111\u20091111\u20091111",
            "<PHONE>, <US_SSN>, <CARD_NUMBER>",
        ),
        ("（０１０）６２３４－５６７８、138.1234.5678", "<PHONE>、<PHONE>"),
        (
            "+8613812345678 0086 13812345678 (86)13812345678 (+86) 138 1234 5678 86-138-1234-5678",
            "<PHONE> <PHONE> <PHONE> <PHONE> <PHONE>",
        ),
        (
            "身份证１１０１０５１９４９１２３１００２Ｘ；110105-19491231-002X",
            "身份证<CHINESE_ID>；<CHINESE_ID>",
        ),
        (
            "9.9.9.9 is the DNS server 9.9.9.9, from 14.17.22.31",
            "9.9.9.9 is the DNS server <IP_ADDRESS>, from <IP_ADDRESS>",
        ),
        ("13812345678-801, Li-13812345678, 138—1234—5678", "<PHONE>, Li-<PHONE>, <PHONE>"),
        ("<13812345678>/13987654321 138·1234·5678", "<<PHONE>>/<PHONE> <PHONE>"),
        ("93.184.216.34-93.184.216.40", "<IP_ADDRESS>-<IP_ADDRESS>"),
        ("phone=%2B8613812345678 02-2345-6789", "phone=%2B<PHONE> <PHONE>"),
        ("14.17.22.31 or ip=8.8.4.4:53", "<IP_ADDRESS> or ip=<IP_ADDRESS>:53"),
        (
            "müller@firma.de, имя@пример.рф, bob@gmail.com.Please",
            "<EMAIL>, <EMAIL>, <EMAIL>.Please",
        ),
        ("GET /login?user=ann.lee%40example.org&x=1", "GET /login?user=<EMAIL>&x=1"),
        (
            "https://x.org?mail=bob%40mail.com 13812345678+13987654321",
            "https://x.org?mail=<EMAIL> <PHONE>+<PHONE>",
        ),
        ("邮箱：bob@x.org（请备注）", "邮箱：<EMAIL>（请备注）"),
        (
            "-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQEAxyz0\nThe text goes on.",
            "<PRIVATE_KEY>\nThe text goes on.",
        ),
    ],
)
def test_personal_data_is_masked(text, masked):
    got, counts = changed(text)
    assert got == masked
    assert counts == {kind: masked.count(f"<{kind.upper()}>") for kind in counts}


@pytest.mark.parametrize(
    "text",
    [
        "In 1914-1918 and 1939-1945, 2019-2020-2021.",
        "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, 9787111544937",
        "ISBN 978 7 111 54493 7",
        "2020-10-12 12:30:45",
        "version 6.1.38.200 and v5.10.192.3",
        "第8.6.1.2节",
        "127.0.0.1 192.168.1.77 10.0.0.255",
        "3.14159265358979",
        "1,234,567,890 people",
        "12345678901",
        "110105194912310021",
        "110105194913310027",
        "4111 1111 1111 1112",
        "4111 1111 1111 11111",
        "0000 0000 0000 0000",
        "000-12-3456 and 666-12-3456",
        "pp. 123-456-7890123",
        "555-1234",
        "http://x.org/13812345678.html",
        "a123-45-6789b",
        "std::vector 10:20:30",
        "user@ and @user and a@b",
        "risk-averse-Behaviour-of-1990s",
        "price +10 to +20",
        "1 2 3 4 5 6 7 8 9 10 11 12",
        "第三百二十一回",
        "order 20201012123456789",
        "-----BEGIN PUBLIC KEY-----",
        "phone: 1381234567",
        "1234-5678-9012",
        "the years 1990 1991 1992 1993",
        "2001:12:30 was a time",
        "N 51.5074 W 0.1278",
        'POLICY = ObjectIdentifier("2.5.29.36")',
        "PostgreSQL 9.6.24.77 came with DSM 6.2.4.25",
        "see section 3.4.12.35.",
        "Windows 10.0.190.44",
        "Chrome/120.0.0.0 Safari/537.36",
        "numpy==1.26.4.120",
        "§ 14.2.3.5 and 14.2.3.6",
        "OID 1.2.250.1",
        "第12.3.4.5条",
        "y = X@W.mean(axis=0)",
        "y = x@w.data",
        "z = q@k.to(device)",
        "git@github.com:team/repo.git",
        "scp a.txt ann@host.org:/tmp",
        "ssh -p 22 ann@host.org",
        "https://git@host.org/x.git",
        "pkg@1.2.3",
        "@scope/name@1.0.0",
        "npm i lodash@4.17.21",
        "@ann@example.social",
        "icon@2x.png",
        "@app.route('/x')",
        "postgres://app:secret@db.example.org:5432/x",
        "https://x.org/13812345678.html",
        "data/13812345678.csv",
        "IMG_13812345678.jpg",
        "Art. 12.1.2.3",
        "IBAN DE89 3704 0044 0532 0130 00",
        "14.5.3.3. 管理文件上下文",
        "14.5.3.3 Methods of work",
        "see 14.5.3.3",
        "224.0.0.1",
        "The population of the province was 13812345678",
        "h = h * 69069 + 907133923",
        "Decimal('+35236450.6')",
        "array([146.68862757, 5.5])",
        "0.13812345678",
        "[0.13812345678,0.15912345678]",
        "+116.397128,+39.916527",
        "+40.7128-074.0060/",
        "order no. 13812345678",
        "订单号：13812345678",
        "13812345678 bytes",
        "$13812345678",
        "13812345678元",
        "550e8400-e29b-41d4-a716-138123456789",
        "https://medium.com/%40ann/post.html",
        "100%40.5 and 5%40off",
        "git%40github.com",
        "x13812345678+13987654321",
        "doi 10.1016/0370-2693(95)00123-4",
        "arXiv:2201.11990",
        "+100 000 000 people",
        "10^13812345678",
    ],
)
def test_other_numbers_are_kept(text):
    assert changed(text) == (text, {})


def test_only_the_requested_kinds_are_masked():
    text = "a@b.org 078-05-1120"
    assert pii.mask(text, ("us_ssn",)) == ("a@b.org <US_SSN>", {"us_ssn": 1})
    assert clean(text, CleanConfig(**KEEP, mask=())).text == text
    assert pii.mask(f"{text}\n" * 3 + "sound\n" + text)[1] == {"email": 4, "us_ssn": 4}


WORDS = "harbour ship market bread painter storm gull railway museum visitor".split()


def _mostly(line, count=40):
    return f"{line}\n" * count


@pytest.mark.parametrize(
    "rule, text, settings",
    [
        ("undecodable", ENGLISH + "\ufffd" * 80, {}),
        ("too_short", ENGLISH[:300], {}),
        ("too_short", CHINESE[:100], {}),
        ("language", CHINESE, {}),
        (
            "language",
            "Der Hafen der alten Stadt wurde von Kaufleuten gebaut, die ein Obdach suchten. " * 12,
            {},
        ),
        ("word_length", ENGLISH.replace(" ", "x"), {"languages": (), "min_tokens": 0}),
        ("symbols", ENGLISH.replace(" ", " # "), {"word_length": (0, 10)}),
        ("symbols", CHINESE.replace("，", "……").replace("的", "…"), {"languages": ("zh",)}),
        ("letters", ENGLISH.replace(" ", " 123 "), {}),
        ("bullets", "\n".join("- " + line for line in ENGLISH.split("\n") if line), {}),
        ("ellipses", ENGLISH.replace(",", "...\n"), {}),
        ("stop_words", " ".join(random.Random(0).choices(WORDS, k=300)), {"languages": ()}),
        ("duplicate_lines", ENGLISH + _mostly("The same line comes again and again."), {}),
        ("duplicate_lines", CHINESE + _mostly("这一行总是一再地出现。"), {"languages": ("zh",)}),
        (
            "duplicate_paragraphs",
            "\n\n".join([ENGLISH.replace("\n", " ")] * 3),
            {"duplicate_lines": 1, "duplicate_line_characters": 1},
        ),
        (
            "top_ngrams",
            "".join(f"the red scarf of {word} " + "buy shoes " * 4 for word in ENGLISH.split()),
            {},
        ),
        (
            "top_ngrams",
            "".join(character + "买鞋找我" for character in CHINESE),
            {"languages": ("zh",)},
        ),
        ("duplicate_ngrams", ENGLISH + " ".join(ENGLISH.split()[20:90]), {}),
        (
            "duplicate_ngrams",
            ENGLISH + " ".join(ENGLISH.split()[20:42]),
            {},
        ),  # within the limit of 5, above that of 10
        ("duplicate_ngrams", CHINESE + CHINESE[20:150], {"languages": ("zh",)}),
    ],
)
def test_each_rule_drops_its_target(rule, text, settings):
    settings = {"stop_words": {"min_stop_words": 2}}.get(rule, {}) | settings
    result = clean(text, CleanConfig(**settings))
    if (
        rule == "stop_words"
    ):  # its words are English, but the identifier may decide otherwise for such a text
        result = clean(
            "the " + text,
            CleanConfig(languages=("en",), min_language_confidence=0, duplicate_ngrams=()),
        )
    assert (result.text, result.dropped, result.counts.get(rule)) == (None, rule, 1)


def test_texts_at_the_limits_are_kept():
    tokens = "word, " * 64  # 64 words and 64 commas
    assert clean(tokens, CleanConfig(**KEEP | {"min_tokens": 128})).dropped is None
    assert clean(tokens, CleanConfig(**KEEP | {"min_tokens": 129})).dropped == "too_short"
    assert clean("字" * 128, CleanConfig(**KEEP | {"min_tokens": 128})).dropped is None
    lines = "\n".join(["a b", "c d", "e f", "a b"])
    assert clean(lines, CleanConfig(**KEEP | {"duplicate_lines": 0.25})).dropped is None
    assert (
        clean(lines, CleanConfig(**KEEP | {"duplicate_lines": 0.24})).dropped == "duplicate_lines"
    )


def test_repetition_measures_by_hand():
    assert duplicate_share(["ab", "cdef", "ab", "ab"]) == (0.5, 0.4)
    units = Units("Big dog big dog a b c d")
    assert (len(units), units.unspaced) == (8, False)
    assert units.top_share(2) == 12 / 16 and units.top_share(3) == 0
    assert units.duplicate_share(2) == 6 / 16
    units = Units("天下天下大势，ab 12。")
    assert units.unspaced and len(units) == 10
    assert units.top_share(2) == 4 / 10 and units.duplicate_share(1) == 2 / 10


def test_ngram_measures_equal_plain_counting():
    draw = random.Random(3)
    for length in (10, 200, 3000):
        words = [draw.choice(WORDS) for _ in range(length)]
        units = Units(" ".join(words))
        total = sum(map(len, words))
        for n in (1, 2, 3, 5):
            grams = [tuple(words[place : place + n]) for place in range(length - n + 1)]
            most = max(map(grams.count, set(grams)))
            top = (
                max(most * len("".join(gram)) for gram in set(grams) if grams.count(gram) == most)
                if most > 1
                else 0
            )
            assert units.top_share(n) == top / total
            seen = set()
            covered = set()
            for place, gram in enumerate(grams):
                covered |= set(range(place, place + n)) if gram in seen else set()
                seen.add(gram)
            assert units.duplicate_share(n) == sum(len(words[place]) for place in covered) / total


def test_a_long_text_is_measured_in_windows():
    draw = random.Random(4)
    words = " ".join(str(draw.randrange(10**6)) for _ in range(20_000))
    once = Units(words)
    assert Units(f"{words} {words}").duplicate_share(5) < 0.5  # the copy is far away
    assert once.duplicate_share(5) == 0


def test_language_is_identified_on_a_bounded_sample():
    assert identify(ENGLISH)[0] == "en" and identify(CHINESE)[0] == "zh"
    assert identify(ENGLISH * 500)[0] == "en" and identify("")[1] < 0.5
    assert all(0 <= identify(text)[1] <= 1 for text in ("", "1", ENGLISH, CHINESE))
    mixed = clean(ENGLISH + CHINESE, CleanConfig(languages=("en", "zh"), min_language_confidence=0))
    assert mixed.dropped is None and mixed.language in ("en", "zh")
    surer = CleanConfig(
        languages=("zh",), min_language_confidence=min(1, identify(CHINESE)[1] + 1e-3)
    )
    assert clean(CHINESE, surer).dropped == "language"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"normalization": "NFD"}, "normalization='NFD'"),
        ({"mask": ("email", "name")}, r"mask=\['name'\].*email"),
        ({"languages": ("english",)}, r"languages=\['english'\].* en "),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"duplicate_lines": 1.5}, "duplicate_lines=1.5 must be between 0 and 1"),
        ({"top_ngrams": ((2, -0.1),)}, "top_ngrams of 2=-0.1"),
        ({"duplicate_ngrams": ((0, 0.1),)}, "n=0"),
    ],
)
def test_invalid_settings_raise_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        CleanConfig(**settings)


@pytest.mark.parametrize(
    "folder, language",
    [
        ("en/gutenberg", "en"),
        ("en/enwiki-sample", "en"),
        ("zh/classic_novels", "zh"),
        ("zh/debian_handbook", "zh"),
    ],
)
def test_real_text_is_almost_unchanged(shared, folder, language):
    config = CleanConfig(languages=(language,))
    for document in read_documents(shared / "data/pretrain" / folder):
        text = document.text[:300_000]
        result = clean(text, config)
        assert result.dropped is None and result.language == language, document.source
        assert result.counts.keys() <= {"unicode", "email", "ip_address"}
        assert sum(result.counts.values()) <= 25 and len(text) - len(result.text) < 0.004 * len(
            text
        )


def test_planted_personal_data_is_found_in_real_text(shared):
    lines = (
        (shared / "data/pretrain/zh/classic_novels/西游记.txt").read_text()[:100_000].split("\n")
    )
    planted = {
        100: f"联系人{CHECKED}",
        200: "电话13912345678",
        300: "京ICP备12345678号",
        400: "邮箱a@b.cn",
    }
    for place, line in planted.items():
        lines[place] = line
    result = clean("\n".join(lines), CleanConfig(languages=("zh",)))
    assert result.counts == {"chinese_id": 1, "phone": 1, "boilerplate": 1, "email": 1}
    kept = [line for place, line in enumerate(lines) if place not in planted]
    assert [line for line in result.text.split("\n") if "<" not in line] == kept
    assert json.dumps(result.counts)
