"""Remove lines of web pages that are not text: cookie and script notices, menus, imprints.

A notice mentions us, our site or your browser, asks the reader to do something, or is the whole
line. Sentences about cookies, JavaScript, newsletters, rights or terms are text.
"""

import re

# Longer lines are text about such things.
_LONGEST = 200

# Menus in lower case: a line with one entry of the first set, or with several of both sets
# separated by marks.
_BUTTONS = frozenset(
    """
privacy policy|terms of use|terms of service|terms and conditions|terms & conditions|cookie policy|
cookie settings|contact us|site map|sitemap|log in|login|sign in|sign up|skip to content|
skip to main content|skip to navigation|read more|click to read more|continue reading|back to top|
advertisement|leave a comment|leave a reply|post a comment|related articles|related posts|
related stories|share this|share this article|share this post|share this page|follow us|
like us on facebook|add to cart|subscribe now|all rights reserved|print this page|
email this article|首页|返回首页|返回顶部|回到顶部|设为首页|加入收藏|网站地图|联系我们|关于我们|
免责声明|隐私政策|用户协议|版权声明|广告服务|友情链接|帮助中心|意见反馈|登录|注册|立即注册|忘记密码|
相关阅读|相关推荐|相关文章|热门推荐|猜你喜欢|阅读全文|阅读原文|查看更多|查看全文|点击查看|
点击查看更多|点击查看详情|点击查看全文|点击查看大图|展开全文|收起全文|加载更多|点击加载更多|上一篇|
下一篇|上一页|下一页|上一章|下一章|打印本页|关闭窗口|广告|点赞|收藏|举报|打赏|分享|分享到|发表评论|
我要评论
""".replace("\n", "").split("|")
)
_OTHERS = _BUTTONS | frozenset(
    """
home|about|about us|contact|help|faq|privacy|terms|cookies|register|subscribe|careers|press|legal|
disclaimer|imprint|accessibility|news|blog|search|next|previous|目录|更多|搜索|关于
""".replace("\n", "").split("|")
)
_BETWEEN = re.compile(r"\s*[|｜·•>»/、\t]\s*|\s{2,}")
_MARKS = " \t\u3000.:：…>»<«|[]【】()（）+-–—*#!！。"

_SITES = (
    r"(?:facebook|twitter|x|linkedin|pinterest|reddit|whatsapp|instagram|telegram|tumblr|"
    r"youtube|weibo|e-?mail)"
)
_SUBJECT = r"(?:we|(?:this|our|the|my) (?:web)?site|this page|this (?:web )?app)"
# Purposes of browser cookies, as opposed to bakery cookies.
_PURPOSE = (
    r"(?:experience|(?:web)?sites?|browser|browsing|privacy|consent|policy|traffic|"
    r"settings|"
    r"preferences|personali[sz]\w*|analy[sz]\w*|analytics|third[- ]part\w+|advert\w*|agree|"
    r"accept|similar technologies|track\w*|opt out|services?|functional\w*)"
)
_ON = r"(?:enable|activate|turn on|switch on|allow)"
_RUN = (
    r"(?:your (?:web )?browser|(?:this|our|the) (?:web)?site|this (?:page|app|application|"
    r"video|"
    r"form|feature)|to (?:view|use|see|continue|proceed|comment|post|run this))"
)
# A sign that a line must contain, in lower case, and the pattern of the notice. C4 (Raffel et al.
# 2020, section 2.2) drops every line with "javascript" or a phrase of policies; here the line must
# be a notice.
_NOTICES = {
    sign: re.compile(pattern, re.IGNORECASE)
    for sign, pattern in {
        "cookie": rf"^\W*{_SUBJECT} uses? (?:\w+ ){{0,3}}cookies\W*$|"
        rf"\b{_SUBJECT}\b.{{0,40}}\b(?:uses?|using|stores?|sets?|"
        rf"places?) (?:[\w-]+ ){{0,4}}cookies\b"
        rf".*\b{_PURPOSE}\b|"
        r"^\W*(?:accept|allow|manage|reject|decline|customi[sz]e) (?:all )?(?:the |our |"
        r"your )?"
        r"(?:necessary |essential |optional )?cookies?(?: settings| preferences)?\W*$|"
        rf"\b{_ON} cookies\b.{{0,40}}\b(?:your (?:web )?browser|this site|our site)|"
        r"\byou (?:agree|consent|accept)\b.{0,40}\bcookies?\b|"
        r"\b(?:accept|agree to|consent to) (?:our|the use of) cookies\b|"
        r"\bour (?:use of cookies|cookies? (?:policy|notice|statement|settings|banner))|"
        r"^\W*please (?:accept|allow|enable) (?:the |our |all )?cookies\b|"
        r"\byour (?:web )?browser\b.{0,30}\bcookies\b.{0,20}\b(?:disabled|blocked|"
        r"turned off)|"
        r"^\W*cookies (?:help|allow|enable) us\b|"
        r"\byour cookie (?:settings|preferences|choices|consent)\b|"
        r"^\W*cookie (?:policy|settings|preferences|notice|consent)\W*$|"
        r"(?:本站|本网站|本页面|我们的?网?站?).{0,8}使用.{0,8}cookie|"
        r"^\W*(?:请)?(?:接受|同意|允许|管理)(?:所有|全部|我们的|使用)?\s?cookies?(?:设置|政策)?\W*$|"
        r"(?:您的?浏览器|请在浏览器).{0,12}cookie|您(?:已|即)?(?:同意|接受).{0,12}cookie",
        "javascript": rf"^\W*(?:please )?{_ON} (?:\w+ )?javascript(?:\W*$|\b.*\b{_RUN}\b|"
        r"\W+(?:and|then) (?:reload|refresh|try)\b)|"
        rf"\b(?:please|you (?:must|need to|have to|"
        rf"should))\b.{{0,40}}\b{_ON} (?:\w+ )?javascript\b|"
        rf"\bjavascript (?:is|must be|has been|seems to be|"
        rf"appears to be) (?:\w+ )?(?:disabled|"
        rf"enabled|required|turned off|blocked|supported)\b(?:.*\b{_RUN}\b|.*\bplease\b)|"
        r"^\W*javascript (?:is|must be) (?:currently |not )?(?:disabled|enabled|"
        r"required|blocked)\W*$|"
        r"^\W*(?:this|our) (?:page|(?:web)?site|application|app|video|content|form) "
        r"(?:requires|needs|works best with) javascript\b|"
        r"\b(?:please|you (?:must|need to|have to|"
        r"should))\b.{0,40}\bjavascript (?:is )?enabled|"
        r"\b(?:this|our) (?:app|(?:web)?site|page)\b.{0,40}\bwithout javascript|"
        r"\byour (?:web )?browser (?:does not|doesn['’]t|has) .{0,20}javascript|"
        r"(?:^|请|您需要|您必须).{0,8}(?:启用|开启|打开|允许)(?:您的)?(?:浏览器的?)?\s?javascript(?:功能|支持)?"
        r"(?:\W*$|.{0,4}(?:才能|以|后)(?:查看|浏览|继续|使用|访问|正常))|"
        r"(?:您|你)的?浏览器.{0,12}(?:禁用|不支持|未启用|没有启用|关闭).{0,8}javascript",
        "share": rf"^\W*share(?: (?:this|it))?(?: article| page| post| story)?(?=.*\b{_SITES}\b)"
        rf"(?:\W*\b(?:on|via|with|to|or|and|{_SITES})\b)+\W*$",
        " us on": rf"^\W*(?:like|follow|find|join) us on(?:\W*\b(?:and|or|{_SITES})\b)+\W*$",
        "all rights reserved": r"(?:©|\(c\)|\bcopyright\b|^\W*(?:19|"
        r"20)\d{2}\b).{0,120}all rights reserved"
        r"(?:\W*$|[.;|].{0,80}$)|^\W*all rights reserved(?:\W*$|\W+(?:©|"
        r"copyright|by|\d{4}))",
        "newsletter": r"(?:^\W*|[.!?] |\byou can |\bplease )(?:sign up|subscribe|register)(?: now|"
        r" today| here)? "
        r"(?:for|to|with) (?:our|the|my|a|your)? ?(?:[\w-]+ ){0,3}newsletters?"
        r"(?:\W*$|\W+(?:and|to|for|today|now|here|below)\b)|"
        r"(?:^\W*|[.!?] |\byou can |\bplease )(?:sign up|subscribe|join|get|"
        r"receive) (?:.{0,30}\b)?our "
        r"(?:[\w-]+ ){0,3}newsletter",
        "click here": r"^\W*(?:please )?click here (?:to|for) .{0,60}$",
        "lorem ipsum": r"^\W*lorem ipsum dolor",
        "powered by": r"^\W*(?:proudly )?powered by (?:wordpress|blogger|disqus|vbulletin|phpbb|"
        r"discuz|shopify|wix)[^,]{0,40}$",
        "版权所有": r"^\W*版权所有(?:\W*$|\s?[:：©(（\d]|"
        r"\W{1,3}(?:\d{4}|侵权|翻印|违者|未经|不得|盗版|仿冒))|"
        r"(?:©|\(c\)|copyright|(?:19|20)\d{2}).{0,40}版权所有|(?:本站|本网|公司)\s?版权所有|"
        r"版权所有\s?(?:©|\d{4}|[,，]?\s?(?:侵权|翻印|违者)必究)",
        "icp": r"[\u4e00-\u9fff]\s?icp\s?[备证]\s?案?号?[:：]?\s?\d{5,}",
        "公网安备": r"公网安备\s?\d{6,}",
        "点击": r"^\W*(?:请|欢迎|更多\S{0,4}请?|您可以)?点击(?:此处|这里|图片|链接|下方|下载)?"
        r"(?:查看|阅读|进入|浏览|下载|访问)?(?:更多|全文|详情|大图|原文).{0,8}$|^\W*(?:请|更多\S{0,4}请?)?点击(?:查看|此处|"
        r"这里).{0,12}$",
        "分享到": r"^\W*(?:一键)?分享到[:：]?"
        r"(?:.{0,6}(?:微信|微博|朋友圈|qq|空间|豆瓣|好友))+.{0,4}$",
        "扫": r"^\W*(?:请|欢迎|微信|立即|快来|赶快)?(?:用?微信)?"
        r"(?:扫一扫|扫描|扫码|长按|识别).{0,15}"
        r"(?:关注|加群|进群|公众号|添加|下载(?:app|客户端))|"
        r"^\W*(?:请|欢迎|微信)?(?:扫一扫|扫描|扫码|长按|识别)?(?:识别)?(?:下方|上方|下面|上面|以下|图中)?"
        r"(?:的)?二维码\W*$",
        "二维码": r"^\W*(?:请|欢迎)?(?:长按|识别).{0,12}二维码",
        "公众号": r"(?:^\W*|请|欢迎|敬请)(?:关注|搜索|添加|订阅)"
        r"(?:我们的?|本站|本报|官方)?(?:微信)?(?:官方)?公众号",
        "编辑": r"^\W*(?:责任编辑|本文编辑|编辑)\s?[:：][^。！？，,!?]{1,20}$",
        "责编": r"^\W*责编\s?[:：][^。！？，,!?]{1,20}$",
        "转载": r"未经.{0,12}(?:许可|授权|同意|允许)?[,，\s]?(?:任何\S{0,10})?"
        r"(?:不得|禁止|严禁|请勿|谢绝)(?:擅自|以任何形式)?(?:转载|复制|摘编)(?:[、或和及]\S{0,8})?(?:\W*$|.{0,12}(?:必究|"
        r"责任))|"
        r"(?:^\W*|请|如需|欢迎|[，,。；;\s])转载(?:请|须|务必|需|应)?.{0,4}(?:注明|联系)(?:出处|来源|本|作者|我们|原)|"
        r"^\W*(?:本文|原创|版权所有)?\W*(?:禁止|严禁|谢绝|请勿|不得)(?:擅自)?转载\W*$",
        "一篇": r"^\W*[上下]一篇\s?[:：].{0,60}$",
        "一章": r"^\W*[上下]一章\s?[:：].{0,60}$",
    }.items()
}


def remove_boilerplate(text: str) -> tuple[str, int]:
    """Return (text without boilerplate lines, number of removed lines)."""
    lines = text.split("\n")
    lowered = text.lower()
    small = lowered.split("\n")
    removed = {
        number for number, line in enumerate(small) if len(line) <= _LONGEST and _is_menu(line)
    }
    for sign, pattern in _NOTICES.items():
        position = 0
        number = 0
        while (found := lowered.find(sign, position)) >= 0:
            number += lowered.count("\n", position, found)
            if len(lines[number]) <= _LONGEST and pattern.search(lines[number]):
                removed.add(number)
            position = lowered.find("\n", found)
            if position < 0:
                break
    if not removed:
        return text, 0
    return "\n".join(line for number, line in enumerate(lines) if number not in removed), len(
        removed
    )


def _is_menu(line: str) -> bool:
    line = line.strip(_MARKS)
    if line in _BUTTONS:
        return True
    separated = any(mark in line for mark in ("|", "  ", "·", "»", "｜"))
    parts = _BETWEEN.split(line) if separated else ()
    return len(parts) > 1 and all(part.strip(_MARKS) in _OTHERS for part in parts)
