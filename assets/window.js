// Shared client code: helpers, buttons, theme. Each tab has its own script.
//
// Events are delegated to the document, because the HTML is replaced during runs.
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  // Names, settings and files belong to a project: a stale page must not change another project.
  const ownProject = () => (window.easel.project === undefined ? {} : { "X-Easel-Project": encodeURIComponent(window.easel.project) });
  const post = async (path, body, options = {}) => {
    const answer = await fetch(`/easel/${path}`, {
      method: "POST", headers: { "Content-Type": "application/json", ...ownProject() }, body: JSON.stringify(body), ...options,
    });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  // Sends a file; the answer of the server, or a problem if it did not arrive.
  const upload = (path, file) => fetch(`/easel/${path}?name=${encodeURIComponent(file.name)}`, { method: "POST", headers: ownProject(), body: file })
    .then((answer) => answer.json()).catch(() => ({ problem: `${file.name} did not arrive; try again.` }));
  const get = async (path) => (await fetch(`/easel/${path}`)).json();
  const press = (id) => document.getElementById(id)?.click();
  const openTab = (name) => all("[role=tab]").find((tab) => tab.textContent.trim() === name)?.click();
  // An element with properties, `data-*` values and other attributes, and children.
  const make = (tag, options = {}, ...inside) => {
    const { data = {}, attributes = {}, ...rest } = options;
    const made = Object.assign(document.createElement(tag), rest);
    Object.assign(made.dataset, data);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...inside);
    return made;
  };
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
  const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  // Calls `look` until it returns false. A call during a run causes at least one more `look`, because a response in
  // flight may be older than the call.
  const follower = (look, pause) => {
    let running = false, again = false;
    return async () => {
      again = true;
      if (running) return;
      running = true;
      try {
        while (again) {
          again = false;
          if (await look()) { again = true; await later(pause); }
        }
      } finally { running = false; }
    };
  };

  // Calls `settle` after the page changed: in the next frame, or after a timeout for hidden pages, which get no frames but
  // whose title and notifications have to follow the run.
  const whenChanged = (settle, attributeFilter) => {
    let asked = false;
    const now = () => { if (asked) { asked = false; settle(); } };
    new MutationObserver(() => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(now);
      setTimeout(now, 250);
    }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter });
  };

  // Keeps the keyboard focus while `draw` replaces the nodes in `place`: on the same control, or on its neighbour.
  const CONTROLS = "button, input, select, textarea, summary, a[href]";
  const nameOf = (node) => [node.tagName, node.id, node.getAttribute("aria-label"), ...Object.entries(node.dataset)].join();
  const refocus = (place, draw) => {
    const controls = () => all(CONTROLS, place);
    const focused = place.contains(document.activeElement) && document.activeElement;
    const at = controls().indexOf(focused), name = focused && nameOf(focused);
    draw();
    if (at < 0 || document.activeElement === focused) return;
    const now = controls(), same = now.filter((node) => nameOf(node) === name);
    (same.includes(now[at]) ? now[at] : same[0] ?? now[Math.min(at, now.length - 1)])?.focus({ preventScroll: true });
  };
  // Replaces the content of `place` only if it differs: a click that started on a node has to end on it.
  const redraw = (place, ...nodes) => {
    const made = place.cloneNode();
    made.append(...nodes);
    if (made.innerHTML !== place.innerHTML) refocus(place, () => place.replaceChildren(...made.childNodes));
  };

  // A note for ten seconds; `undo` takes back what it tells.
  const toast = (text, tone = "", undo = null) => {
    const place = one("#easel-toast") ?? one(".gradio-container").appendChild(make("div", { id: "easel-toast", attributes: { role: "status" } }));
    const close = () => place.classList.remove("on");
    const buttons = [make("button", { type: "button", textContent: "×", onclick: close, attributes: { "aria-label": "Dismiss" } })];
    if (undo) buttons.unshift(make("button", { type: "button", onclick: undo }, "Undo ", make("kbd", { textContent: "Ctrl+Z" })));
    place.replaceChildren(make("span", { textContent: text }), ...buttons);
    place.dataset.tone = tone;
    place.classList.add("on");
    clearTimeout(toast.timer);
    toast.timer = setTimeout(close, 10_000);
  };

  // API for the other scripts; `settling` functions run whenever HTML may have been replaced.
  window.easel = {
    openTab, one, all, get, post, upload, ownProject, press, make, plural, later, follower, whenChanged, refocus, redraw, toast, settling: [],
  };

  // Browsers have a clipboard only at localhost and over https.
  const copy = async (button, text) => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { toast("The browser allows no copying at this address; select the text instead.", "bad"); }
  };

  // ---- one listener per event type -----------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, a, [data-picture]");
    if (!target) return;
    const data = target.dataset;
    if (data.tab) openTab(data.tab);
    else if (data.copy !== undefined) copy(target, data.copy);
    else if (data.themeSwitch !== undefined) {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("easel-theme", dark ? "dark" : "light");
    }
  });

  // ---- addresses: #train, #run/NAME; Back works and a reload returns to the same place ------------------------
  const place = () => {
    // An address is typed or linked from anywhere: one that is not encoded right is taken as it is.
    try { return location.hash.slice(1).split("/").map(decodeURIComponent); } catch { return location.hash.slice(1).split("/"); }
  };
  const openTabName = () => one("[role=tab][aria-selected=true]")?.textContent.trim().toLowerCase() ?? "";
  const shownRun = () => one("#run-status")?.dataset.shownRun ?? "";
  let following = true, awaited = "";
  const follow = () => {
    const [name, run] = place();
    const tabs = all("[role=tab]"), wanted = name === "run" ? "train" : name;
    const tab = tabs.find((each) => each.textContent.trim().toLowerCase() === wanted) ?? tabs[0];
    if (tab?.getAttribute("aria-selected") !== "true") tab?.click();
    if (name === "run" && run && run !== shownRun()) {
      awaited = run;
      post("run", { do: "show", run: awaited }).then(() => press("refresh")).finally(() => setTimeout(() => { awaited = ""; }, 5000));
    }
  };
  addEventListener("hashchange", follow);
  // A tab that the user opened before the page was ready counts more than the address.
  document.addEventListener("click", (event) => {
    if (event.isTrusted && event.target.closest("[role=tab], [data-tab]")) following = false;
  }, true);
  const keepAddress = () => {
    if (!document.documentElement.dataset.ready) return;
    // The address that the page was opened with is followed first.
    if (following) { following = false; if (location.hash) follow(); return; }
    const [name, run] = place(), now = openTabName(), shown = shownRun();
    const tab = name === "run" ? "train" : name || "dataset";
    if (now && now !== tab) history.pushState(null, "", `#${now}`);
    else if (awaited && awaited === shown) awaited = "";
    else if (name === "run" && !awaited && shown && run !== shown) history.replaceState(null, "", `#run/${encodeURIComponent(shown)}`);
  };

  // ---- a list opens on a key or a click, not on the focus that Tab brings ----------------------------------------
  let tabbed = false;
  const closed = new WeakSet();
  document.addEventListener("pointerdown", () => { tabbed = false; }, true);
  document.addEventListener("keydown", (event) => {
    tabbed = event.key === "Tab";
    if (tabbed || event.key === "Shift" || !closed.delete(event.target)) return;
    event.target.dispatchEvent(new FocusEvent("focus"));
  }, true);
  document.addEventListener("focus", (event) => {
    if (!tabbed || !event.isTrusted || event.target.getAttribute?.("role") !== "listbox") return;
    closed.add(event.target);
    event.stopImmediatePropagation();
  }, true);

  // ---- the server is away ------------------------------------------------------------------------------------
  const call = window.fetch.bind(window);
  const away = (is) => {
    document.documentElement.toggleAttribute("data-away", is);
    const note = one("#away");
    if (note) note.hidden = !is;
  };
  window.fetch = async (...asked) => {
    try {
      const answer = await call(...asked);
      away(false);
      return answer;
    } catch (error) {
      if (error instanceof TypeError) away(true);
      throw error;
    }
  };

  // ---- after Gradio replaced HTML ----------------------------------------------------------------
  const showBadges = () => {
    const badges = JSON.parse(one("[data-badges]")?.dataset.badges ?? "{}");
    for (const tab of all("[role=tab]")) {
      const badge = badges[tab.textContent.trim()] ?? "";
      if ((tab.dataset.badge ?? "") !== badge) tab.dataset.badge = badge;
    }
  };
  // A control with a name that a response drew anew keeps the keyboard focus.
  let focused = null;
  document.addEventListener("focusin", ({ target }) => { focused = target.matches(CONTROLS) && (target.id || target.dataset.body) ? target : null; });
  document.addEventListener("pointerdown", () => { focused = null; }, true);
  const keepFocus = () => {
    if (!focused || focused.isConnected || document.activeElement !== document.body) return;
    const name = nameOf(focused);
    focused = null;
    all(CONTROLS).find((node) => nameOf(node) === name)?.focus({ preventScroll: true });
  };
  const settle = () => {
    keepFocus();
    keepAddress();
    showBadges();
    const title = one("[data-page-title]")?.dataset.pageTitle;
    if (title && document.title !== title) document.title = title;
    for (const follow of window.easel.settling) follow();
  };
  whenChanged(settle, ["data-page-title", "data-mark", "data-meter", "data-project", "disabled", "aria-selected", "data-ready", "data-shown-run"]);

  const theme = localStorage.getItem("easel-theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
})();
