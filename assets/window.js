// The browser's half of the window: the run's buttons and the theme; each tab has a script of its own.
//
// All of it works by delegation on the document, because the page's pieces of HTML are replaced as runs go on.
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const post = async (path, body, options = {}) => {
    const answer = await fetch(`/easel/${path}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...options,
    });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const press = (id) => document.getElementById(id)?.click();
  const openTab = (name) => all("[role=tab]").find((tab) => tab.textContent.trim() === name)?.click();
  // What the other scripts use; `settling` is called whenever pieces of the page may have been replaced.
  window.easel = { openTab, one, all, post, press, settling: [] };

  // ---- one listener a kind of event -----------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, a, [data-picture]");
    if (!target) return;
    const data = target.dataset;
    if (data.press) press(data.press);
    else if (data.tab) openTab(data.tab);
    else if (data.showPreview !== undefined) openTab("Preview");
    else if (data.runShow) post("run", { do: "show", run: data.runShow }).then(() => press("refresh"));
    else if (data.runResume) post("run", { do: "resume", run: data.runResume }).then(() => press("refresh"));
    else if (data.copy !== undefined) navigator.clipboard.writeText(data.copy).then(() => { target.textContent = "Copied"; });
    else if (data.themeSwitch !== undefined) {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("easel-theme", dark ? "dark" : "light");
    }
  });

  // ---- what must follow when Gradio replaces a piece ----------------------------------------------------------------
  const settle = () => {
    const title = one("[data-page-title]")?.dataset.pageTitle;
    if (title && document.title !== title) document.title = title;
    for (const follow of window.easel.settling) follow();
    // A disabled button says why, to the pointer too.
    for (const button of all("#export-download, #copy-export")) {
      const why = button.disabled ? "There is no checkpoint yet; train something first." : "";
      if (button.title !== why) button.title = why;
    }
  };
  let asked = false;
  new MutationObserver(() => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; settle(); });
  }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-page-title", "data-mark", "data-meter", "data-project", "disabled"] });

  const theme = localStorage.getItem("easel-theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
})();
