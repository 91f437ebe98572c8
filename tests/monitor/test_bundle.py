"""The page's modules as one script."""

import pytest

from distbelief.monitor.bundle import BundleError, bundle


def test_each_module_is_there_once_and_before_who_imports_it():
    script = bundle(
        {
            "app.js": 'import { a } from "./a.js";\nimport { b } from "./b.js";\nrun(a, b);',
            "a.js": 'import { b } from "./b.js";\nexport const a = b + 1;',
            "b.js": "export const b = 1;",
            "other.js": "never();",
        },
        "app.js",
    )
    places = [script.index(f"const module_{name} =") for name in ("b", "a", "app")]
    assert places == sorted(places)
    assert script.count("module_b = ") == 1
    assert "never" not in script
    assert "import" not in script
    assert "export" not in script


def test_the_forms_that_are_understood():
    script = bundle(
        {
            "app.js": 'import {\n  one,\n  two as zwei,\n} from "./x-y.js";\nimport "./side.js";\n',
            "x-y.js": (
                "export function one() {}\nexport async function soon() {}\nexport class C {}\n"
                "function hidden() {}\nconst two = 2;\nexport { two, hidden as shown };"
            ),
            "side.js": "document.title = 1;",
        },
        "app.js",
    )
    assert "const { one, two: zwei } = module_x_y;" in script
    assert "return { one, soon, C, two, shown: hidden };" in script
    assert "document.title = 1;" in script


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('import x from "./b.js";', "not understood"),
        ('import * as x from "./b.js";', "not understood"),
        ("export default 3;", "not understood"),
        ("export let changing = 1;", "not understood"),
        ('export * from "./b.js";', "not understood"),
        ('import { a } from "https://elsewhere/a.js";', "not understood"),
        ('import { a } from "./missing.js";', "missing.js, which is not there"),
        ('import { b } from "./b.js";', "each other: app.js -> b.js -> app.js"),
    ],
)
def test_what_is_not_understood_is_an_error(text, said):
    modules = {"app.js": text, "b.js": 'import { a } from "./app.js";\nexport const b = 1;'}
    with pytest.raises(BundleError, match=said):
        bundle(modules, "app.js")


@pytest.mark.parametrize("text", ["const x = '</script>';", "// <!-- a comment", "'</SCRIPT >'"])
def test_no_text_ends_the_element_that_it_is_in(text):
    with pytest.raises(BundleError, match="would end the element"):
        bundle({"app.js": text}, "app.js")
