"""Every text of the page, in the languages that it speaks.

English helps of options are the options' own (`settings.py`); here stand their labels and what they mean in Chinese. An
option that is not here appears all the same, under its own name and with its English help.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Language = Literal["en", "zh"]
LANGUAGES: Mapping[Language, str] = {"en": "English", "zh": "中文"}
"""By what each calls itself."""


class Text(NamedTuple):
    en: str
    zh: str


class OptionText(NamedTuple):
    label: Text
    zh: str
    """The help."""


TEXTS: Mapping[str, Text] = {
    "language": Text("Language", "语言"),
    "about": Text(
        "BAGEL draws, edits and understands pictures, here on your own machine.",
        "BAGEL 能画图、改图、看图，全部在你自己的机器上运行。",
    ),
    # Tabs
    "draw": Text("Draw", "画图"),
    "edit": Text("Edit", "改图"),
    "ask": Text("Ask", "看图问答"),
    "mixed": Text("Mixed", "图文混合"),
    "chat": Text("Chat", "对话"),
    "history": Text("History", "历史"),
    "model": Text("Model", "模型"),
    # What is asked for
    "prompt": Text("What to draw", "想画什么"),
    "prompt_hint": Text("Describe the picture. Shift+Enter draws it.", "描述这张图。按 Shift+Enter 开始画。"),
    "change": Text("What to change", "想改什么"),
    "change_hint": Text("Say how to change the picture. Shift+Enter starts.", "说明怎样修改。按 Shift+Enter 开始。"),
    "question": Text("Question", "问题"),
    "question_hint": Text("Ask about the picture, or anything. Shift+Enter asks.", "问图里的内容，按 Shift+Enter。"),
    "input_picture": Text("Picture", "图片"),
    "asked_picture": Text("Picture (may be left out)", "图片（可以不放）"),
    "part_text": Text("Part {number}: text", "第 {number} 部分：文字"),
    "part_hint": Text("A text, in its place among the pictures", "一段文字，按它在图片之间的顺序"),
    "part_picture": Text("Part {number}: picture", "第 {number} 部分：图片"),
    "add_text": Text("Add a text", "加一段文字"),
    "add_picture": Text("Add a picture", "加一张图片"),
    "remove_part": Text("Remove the last part", "去掉最后一部分"),
    "output": Text("Then", "然后"),
    "output_image": Text("draw a picture", "画一张图"),
    "output_text": Text("write an answer", "写出回答"),
    "examples": Text("Examples", "示例"),
    "message": Text("Your turn", "你说"),
    "message_hint": Text(
        "Say something. It may answer in texts and pictures. Shift+Enter sends.",
        "说点什么，回答可以有文字也有图片。按 Shift+Enter 发送。",
    ),
    # Buttons
    "go_draw": Text("Draw", "开始画"),
    "go_edit": Text("Edit", "开始改"),
    "go_ask": Text("Ask", "提问"),
    "go_mixed": Text("Start", "开始"),
    "go_chat": Text("Say", "发送"),
    "undo_chat": Text("Take back", "撤回"),
    "new_chat": Text("New chat", "新对话"),
    "save_chat": Text("Save", "保存"),
    "open_chat": Text("Open", "打开"),
    "cancel": Text("Cancel", "取消"),
    "reset": Text("Reset all settings", "恢复默认设置"),
    "edit_this": Text("Edit this picture", "修改这张图"),
    "ask_this": Text("Ask about this picture", "就这张图提问"),
    # Settings
    "more": Text("More settings", "更多设置"),
    "ratio": Text("Picture ratio", "画面比例"),
    "ratio_help": Text("Sets width and height, which can also be given below", "设定宽和高，也可以在下面自己填写"),
    "ratio_auto": Text("automatic", "自动"),
    "random_seed": Text("Random seed", "随机种子"),
    "last_seed": Text("Reuse last seed", "沿用上次种子"),
    "from": Text("from", "从"),
    "to": Text("to", "到"),
    "limits": Text("{low:g} to {high:g}", "{low:g} 到 {high:g}"),
    "by_itself": Text("automatic", "自动"),
    "dropped": Text("Drop a picture of ours to take its settings", "把本程序画的图拖到这里，取回它的设置"),
    "restored": Text("What was asked for is back, with its settings.", "当时的输入和设置已取回。"),
    "restored_in_part": Text(
        "Prompt and settings are back; a picture is no longer kept here.", "提示词和设置已取回；有图片已不再保存。"
    ),
    "restored_from": Text("Prompt and settings are those of {name}.", "提示词和设置已取自 {name}。"),
    "drop_here": Text("Drop a picture here, or click to choose one", "把图片拖到这里，或点击选择"),
    "yes": Text("yes", "是"),
    "no": Text("no", "否"),
    # Progress
    "result": Text("Result", "结果"),
    "picture_of": Text("Picture drawn for: {prompt}", "按此画出的图：{prompt}"),
    "preview_of": Text("The picture as it forms", "正在成形的图"),
    "plan_text": Text("What it thinks", "思考过程"),
    "answer": Text("Answer", "回答"),
    "sending": Text("Sending ...", "正在发送……"),
    "waiting": Text("Place {place} in the queue, done in about {time}", "排在第 {place} 位，约 {time}后完成"),
    "starting": Text("Starting, done in about {time}", "正在开始，约 {time}后完成"),
    "writing": Text("Writing", "正在书写"),
    "step": Text("Step {step} of {steps}, {time} left", "第 {step} 步，共 {steps} 步，还需 {time}"),
    "decoding": Text("All {steps} steps done, making the picture", "{steps} 步全部完成，正在生成图片"),
    "done": Text("Done in {time}. Seed {seed}.", "完成，用时 {time}。种子 {seed}。"),
    "done_size": Text("{width}×{height}.", "{width}×{height}。"),
    "cancelled": Text("Cancelled.", "已取消。"),
    "refused": Text("That does not work: {reason}", "无法完成：{reason}"),
    "busy": Text("{reason} (worth a try in {time})", "{reason}（可在 {time}后再试）"),
    "fault": Text("A fault of the program; the server's log says more.", "程序出错；详情见服务器日志。"),
    "seconds": Text("{count} s", "{count} 秒"),
    "minutes": Text("{count} min", "{count} 分钟"),
    "hours": Text("{count} h", "{count} 小时"),
    # Chat
    "conversation": Text("The conversation", "对话内容"),
    "chat_empty": Text(
        "What is said appears here. Each turn is answered in the context of all before it.",
        "对话会出现在这里。每一轮都在之前所有内容的基础上回答。",
    ),
    "you": Text("You", "你"),
    "picture_given": Text("Picture that you gave, {number}", "你给的图片 {number}"),
    "picture_answered": Text("Picture {number} of the answer", "回答中的图片 {number}"),
    "picture_unseen": Text(
        "(A picture that cannot be shown: it could not be written.)", "（有一张图片无法写入，因此无法显示。）"
    ),
    "chat_file": Text("chat.zip: the chat with its pictures, to be opened again", "chat.zip：对话和图片，可再次打开"),
    "chat_opened": Text(
        "Opened; turns: {count}. The next one reads them again.", "已打开，共 {count} 轮。下一轮会先重读。"
    ),
    "taken_back": Text("The last turn is taken back.", "已撤回上一轮。"),
    "still_answering": Text("This chat is still being answered", "这个对话还在回答中"),
    "nothing_said": Text("Nothing was said yet.", "还没有对话。"),
    "ended_max_rounds": Text("It asked for one more picture than it may draw.", "它还想再画一张，但已到图片上限。"),
    "ended_max_new_tokens": Text(
        "Its last text was cut: it has the most tokens allowed.", "最后一段文字已到词元上限，被截断。"
    ),
    # History
    "history_pictures": Text("What was made in this session", "本次会话的结果"),
    "history_empty": Text("What you make appears here, with its settings.", "你的结果会连同设置出现在这里。"),
    "history_choose": Text("Choose one to see its settings.", "选择一项查看设置。"),
    "restore": Text("Restore prompt and settings", "取回提示词和设置"),
    "setting": Text("Setting", "设置"),
    "value": Text("Value", "值"),
    # Model
    "loading": Text("Loading the model: {done} of {total}", "正在加载模型：{done}，共 {total}"),
    "loading_begins": Text("Loading the model ...", "正在加载模型……"),
    "load_failed": Text("The model could not be loaded: {reason}", "模型无法加载：{reason}"),
    "ready": Text("Ready: {name}", "已就绪：{name}"),
    "queue_waits": Text("{count} waiting", "{count} 个在排队"),
    "model_name": Text("Model", "模型"),
    "format": Text("Weight format", "权重格式"),
    "device": Text("Device", "设备"),
    "dtype": Text("Arithmetic", "运算精度"),
    "tasks": Text("Loaded for", "可用于"),
    "places": Text("Where weights live", "权重存放位置"),
    "place_device": Text("{count} of {total} layer units on the device", "{total} 个层单元中 {count} 个在设备上"),
    "place_pinned": Text("{count} in page-locked RAM", "{count} 个在锁页内存"),
    "place_pageable": Text("{count} in plain RAM", "{count} 个在普通内存"),
    "place_disk": Text("{count} on disk", "{count} 个在磁盘"),
    "place_staged": Text("visiting the device when needed: {parts}", "需要时才调入设备：{parts}"),
    "peak": Text("Predicted peak memory", "预计内存峰值"),
    "predicted": Text("Predicted time of a picture", "预计每张图用时"),
    "reasons": Text("Why", "原因"),
    "memory": Text("Memory of the device", "设备内存"),
    "memory_used": Text("{used} of {total} in use", "已用 {used}，共 {total}"),
}  # fmt: skip

OPTIONS: Mapping[str, OptionText] = {
    "height": OptionText(Text("Height", "高"), "图片高度，单位像素，为 16 的倍数"),
    "width": OptionText(Text("Width", "宽"), "图片宽度，单位像素，为 16 的倍数"),
    "seed": OptionText(Text("Seed", "种子"), "同样的种子和设置会得到同样的结果；留空则随机，并会显示出来"),
    "num_timesteps": OptionText(Text("Timesteps", "时间步数"), "去噪的时间步数，至少 2；越多越细致，也越慢"),
    "timestep_shift": OptionText(Text("Timestep shift", "时间步偏移"), "越大，越多的步数用于构图"),
    "cfg_text_scale": OptionText(Text("Text guidance", "文字引导强度"), "画面贴合文字的程度；1 表示关闭引导"),
    "cfg_img_scale": OptionText(Text("Picture guidance", "图片引导强度"), "画面贴合输入图片的程度"),
    "cfg_interval": OptionText(Text("Guided timesteps", "引导区间"), "使用引导的时间步：从多少到多少"),
    "cfg_renorm_type": OptionText(Text("Renormalization", "重新归一化方式"), "对引导结果的哪一部分重新归一化"),
    "cfg_renorm_min": OptionText(Text("Least renormalization", "最小归一化系数"), "重新归一化系数的下限"),
    "think": OptionText(Text("Think first", "先思考"), "先写出计划或推理，再画图或回答"),
    "max_think_tokens": OptionText(Text("Most tokens of the plan", "计划的最多词元"), "思考时最多写多少词元"),
    "frames": OptionText(Text("Frames", "帧数"), "一次画出的连续图片数；多于一张时合成一张总图显示"),
    "frame_mode": OptionText(
        Text("Frames are drawn", "帧的画法"), "together：所有帧一起画；turn：逐帧画，每一帧都能看到之前的帧"
    ),
    "frame_delta": OptionText(Text("Positions between frames", "帧间位置间隔"), "一起画时，相邻两帧之间的位置编码间隔"),
    "speed": OptionText(
        Text("Speed", "速度"), "按用途选择步缓存：exact 每步都算，balanced 约三分之一，fast 约四分之一"
    ),
    "step_cache": OptionText(Text("Step cache", "步缓存"), "部分步数用预测代替计算，更快，画面略有不同"),
    "step_cache_threshold": OptionText(
        Text("Step cache threshold", "步缓存阈值"), "first-block 缓存：第一层变化小于此值时跳过该步"
    ),
    "style": OptionText(
        Text("How it asks for a picture", "如何要求画图"), "模型要求画图的方式，按模型系列；auto 按检查点名称判断"
    ),
    "max_rounds": OptionText(
        Text("Most pictures of an answer", "每次回答的最多图片"), "一次回答最多画几张图；留空则按系列，多为 3"
    ),
    "max_new_tokens": OptionText(Text("Most tokens of the answer", "回答的最多词元"), "回答最多写多少词元"),
    "do_sample": OptionText(Text("Sample", "随机采样"), "随机抽取词元，而不是总取最可能的"),
    "temperature": OptionText(Text("Temperature", "温度"), "采样温度；越高越多样"),
    "top_p": OptionText(Text("Top p", "Top p"), "采样时只考虑累计概率在此以内的词元"),
}


def say(key: str, language: Language, **values: Any) -> str:
    """A text, with its values filled in."""
    return getattr(TEXTS[key], language).format(**values)  # type: ignore[no-any-return]


def option_label(name: str, language: Language) -> str:
    """What an option is called on the page; its own name, spaced, where nobody has named it."""
    known = OPTIONS.get(name)
    return name.replace("_", " ").capitalize() if known is None else getattr(known.label, language)


def option_help(name: str, english: str, language: Language) -> str:
    """What an option means."""
    known = OPTIONS.get(name)
    return known.zh if known is not None and language == "zh" else english


def language_of(wanted: object) -> Language:
    """One of ours; English for whatever else a page says."""
    return next((known for known in LANGUAGES if known == wanted), "en")


def duration(seconds: float, language: Language) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min, 2 h."""
    if seconds < 10:
        return say("seconds", language, count=f"{seconds:.1f}".removesuffix(".0"))
    if seconds < 90:
        return say("seconds", language, count=f"{seconds:.0f}")
    if seconds < 5400:
        return say("minutes", language, count=f"{seconds / 60:.0f}")
    return say("hours", language, count=f"{seconds / 3600:.1f}")
