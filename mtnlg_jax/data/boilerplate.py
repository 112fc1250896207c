"""Lines of web pages that are not their text: notices about cookies and JavaScript, menus, buttons, imprints."""

import re

# Longer lines are text that speaks of such things.
_LONGEST = 200

# Lines of nothing but these, in lower case: one of the first, or several of both with marks between them.
_BUTTONS = frozenset("""
privacy policy|terms of use|terms of service|terms and conditions|terms & conditions|cookie policy|cookie settings|
contact us|site map|sitemap|log in|login|sign in|sign up|skip to content|skip to main content|skip to navigation|
read more|click to read more|continue reading|back to top|advertisement|leave a comment|leave a reply|post a comment|
related articles|related posts|related stories|share this|share this article|share this post|share this page|
follow us|like us on facebook|add to cart|subscribe now|all rights reserved|print this page|email this article|
首页|返回首页|返回顶部|回到顶部|设为首页|加入收藏|网站地图|联系我们|关于我们|免责声明|隐私政策|用户协议|版权声明|广告服务|
友情链接|帮助中心|意见反馈|登录|注册|立即注册|忘记密码|相关阅读|相关推荐|相关文章|热门推荐|猜你喜欢|阅读全文|阅读原文|
查看更多|查看全文|点击查看|点击查看更多|点击查看详情|点击查看全文|点击查看大图|展开全文|收起全文|加载更多|点击加载更多|
上一篇|下一篇|上一页|下一页|上一章|下一章|打印本页|关闭窗口|广告|点赞|收藏|举报|打赏|分享|分享到|发表评论|我要评论
""".replace("\n", "").split("|"))
_OTHERS = _BUTTONS | frozenset("""
home|about|about us|contact|help|faq|privacy|terms|cookies|register|subscribe|careers|press|legal|disclaimer|imprint|
accessibility|news|blog|search|next|previous|目录|更多|搜索|关于
""".replace("\n", "").split("|"))
_BETWEEN = re.compile(r"\s*[|｜·•>»/、\t]\s*|\s{2,}")
_MARKS = " \t\u3000.:：…>»<«|[]【】()（）+-–—*#!！。"

_SITES = r"(?:facebook|twitter|x|linkedin|pinterest|reddit|whatsapp|instagram|telegram|tumblr|youtube|weibo|e-?mail)"
# What a line must hold, in lower case, and how it looks then. C4 (Raffel et al. 2020, section 2.2) drops every line
# with "javascript" and with phrases of policies; here it must also say so as a notice does.
_NOTICES = {sign: re.compile(pattern, re.IGNORECASE) for sign, pattern in {
    "cookie": r"\b(?:we|(?:web)?site|it|you)\b.{0,40}\b(?:uses?|using|accept|agree|consent) (?:\w+ ){0,4}cookies\b|"
              r"\b(?:accept|allow|manage|reject|decline) (?:all )?(?:the |our )?cookies\b|"
              r"\bour (?:use of cookies|cookie)|(?:使用|接受|同意|启用).{0,8}cookie",
    "javascript": r"\b(?:enable|activate|turn on|allow) (?:\w+ )?javascript\b|"
                  r"\b(?:page|(?:web)?site|application|app|video|content) (?:requires|needs) javascript\b|"
                  r"\bjavascript (?:is|must be|has been|seems to be|appears to be) (?:\w+ )?"
                  r"(?:disabled|enabled|required|turned off|blocked|supported)|"
                  r"(?:启用|开启|打开|禁用|不支持).{0,8}javascript",
    "share": rf"^\W*share(?: (?:this|it))?(?: article| page| post| story)?"
             rf"(?:\W*\b(?:on|via|with|to|or|{_SITES})\b)+\W*$",
    " us on": rf"^\W*(?:like|follow|find|join) us on(?:\W*\b(?:and|or|{_SITES})\b)+\W*$",
    "all rights reserved": r"(?:©|\(c\)|copyright|\d{4}).*all rights reserved|^\W*all rights reserved",
    "newsletter": r"\b(?:sign up|subscribe|register)\b.{0,30}\bnewsletter",
    "click here": r"^\W*(?:please )?click here (?:to|for) .{0,60}$",
    "lorem ipsum": r"lorem ipsum dolor",
    "powered by": r"^\W*(?:proudly )?powered by (?:wordpress|blogger|disqus|vbulletin|phpbb|discuz|shopify|wix)",
    "版权所有": r"版权所有",
    "icp": r"[\u4e00-\u9fff]\s?icp\s?[备证]",
    "公网安备": r"公网安备",
    "点击": r"点击(?:此处|这里|图片)?(?:查看|阅读|进入|浏览|下载)?(?:更多|全文|详情|大图|原文)|^.{0,6}点击查看.{0,12}$",
    "分享到": r"^.{0,4}分享到[:：]?(?:.{0,6}(?:微信|微博|朋友圈|qq|空间|豆瓣|好友))+.{0,4}$",
    "扫": r"(?:扫一扫|扫描|扫码|长按).{0,15}(?:二维码|关注|公众号|加群)",
    "公众号": r"(?:关注|搜索|添加|订阅).{0,12}公众号",
    "编辑": r"^\W*(?:责任编辑|本文编辑|编辑)\s?[:：].{1,20}$",
    "责编": r"^\W*责编\s?[:：].{1,20}$",
    "转载": r"未经.{0,12}(?:许可|授权|同意|允许).{0,12}(?:转载|复制|摘编|使用)|转载.{0,6}(?:注明|联系)|"
            r"(?:禁止|严禁|谢绝|请勿|不得)(?:擅自)?转载",
    "一篇": r"^\W*[上下]一篇\s?[:：].{0,60}$",
    "一章": r"^\W*[上下]一章\s?[:：].{0,60}$",
}.items()}


def remove_boilerplate(text: str) -> tuple[str, int]:
    """(text without such lines, how many they were)."""
    lines, lowered = text.split("\n"), text.lower()
    small = lowered.split("\n")
    doomed = {number for number, line in enumerate(small) if len(line) <= _LONGEST and _is_menu(line)}
    for sign, pattern in _NOTICES.items():
        place = number = 0
        while (found := lowered.find(sign, place)) >= 0:
            number += lowered.count("\n", place, found)
            if len(lines[number]) <= _LONGEST and pattern.search(lines[number]):
                doomed.add(number)
            place = lowered.find("\n", found)
            if place < 0:
                break
    if not doomed:
        return text, 0
    return "\n".join(line for number, line in enumerate(lines) if number not in doomed), len(doomed)


def _is_menu(line: str) -> bool:
    line = line.strip(_MARKS)
    if line in _BUTTONS:
        return True
    parts = _BETWEEN.split(line) if "|" in line or "  " in line or "·" in line or "»" in line or "｜" in line else ()
    return len(parts) > 1 and all(part.strip(_MARKS) in _OTHERS for part in parts)
