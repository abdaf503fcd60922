/* Counts what is left of each lease, by the database's clock, and asks every few seconds for the
   rows that are on the page. Without it the pages say what was so when they were loaded.

   A page that nobody looks at asks nothing. Nothing is announced to screen readers. */
"use strict";
{
  const live = document.getElementById("distlock-live");
  const LONGEST = 60;
  const PATIENCE = 10000;

  /* The same as duration() in states.py, to the second. */
  function duration(microseconds) {
    const seconds = Math.floor(Math.max(0, microseconds) / 1e6);
    if (seconds < 60) {
      return `${seconds} s`;
    }
    const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
    const parts = [
      [Math.floor(hours / 24), "d"], [hours % 24, "h"], [minutes % 60, "min"], [seconds % 60, "s"],
    ];
    const first = parts.findIndex(([count]) => count);
    return parts.slice(first, first + 2).filter(([count]) => count)
      .map(([count, unit]) => `${count} ${unit}`).join(" ");
  }

  function write(element, text) {
    if (element.textContent !== text) {
      element.textContent = text;
    }
  }

  function start() {
    const detail = live.dataset.pk;
    const every = Number(live.dataset.every);
    const shown = new Map(); // what the server said of a cell: it is replaced only if that changes
    let base = Number(live.dataset.now), at = performance.now();
    let asked = at, failures = 0, asking = false, over = false;

    const now = () => base + (performance.now() - at) * 1000;

    function count() {
      let ended = false;
      for (const element of document.querySelectorAll("[data-distlock-since]")) {
        write(element, duration(now() - Number(element.dataset.distlockSince)));
      }
      for (const element of document.querySelectorAll("[data-distlock-until]")) {
        const left = Math.max(0, Number(element.dataset.distlockUntil) - now());
        write(element, duration(left));
        ended = ended || left === 0;
        const whole = element.closest("[data-distlock-whole]");
        const part = whole && whole.querySelector(".part");
        if (part) {
          part.setAttribute("width", Math.min(100, 100 * left / Number(whole.dataset.distlockWhole)));
        }
      }
      return ended;
    }

    function cell(pk, column) {
      if (detail) {
        return document.querySelector(`.fieldBox.field-${column} .readonly`)
          || document.querySelector(`.form-row.field-${column} .readonly`);
      }
      const name = document.querySelector(`[data-distlock-pk="${pk}"]`);
      return name && name.closest("tr").querySelector(`.field-${column}`);
    }

    function show(pk, said) {
      for (const [column, html] of Object.entries(said.cells)) {
        const key = `${pk} ${column}`, place = cell(pk, column);
        if (place && shown.get(key) !== html) {
          place.innerHTML = html; // the server's own, escaped as in the page
          shown.set(key, html);
        }
      }
      if (!detail) {
        const name = document.querySelector(`[data-distlock-pk="${pk}"]`);
        const token = name && name.closest("tr").querySelector(".distlock-token");
        if (token) {
          write(token, said.token);
        }
      }
    }

    function say(text, stale) {
      live.classList.toggle("distlock-stale", stale);
      write(live, text);
    }

    async function ask() {
      const pks = detail ? [detail]
        : [...document.querySelectorAll("[data-distlock-pk]")].map((name) => name.dataset.distlockPk);
      if (!pks.length) {
        return;
      }
      const query = new URLSearchParams(pks.map((pk) => ["pk", pk]));
      if (detail) {
        query.append("detail", "1");
      }
      const before = performance.now();
      const response = await fetch(`${live.dataset.url}?${query}`, {
        headers: {"Accept": "application/json"},
        redirect: "error",
        signal: AbortSignal.timeout(PATIENCE),
      });
      if (!response.ok) {
        over = response.status === 403;
        throw new Error(response.status);
      }
      const answer = await response.json();
      base = answer.now;
      at = (before + performance.now()) / 2;
      const token = detail && document.querySelector(".form-row.field-token .readonly");
      if (token && answer.rows[detail]?.token !== token.textContent.trim()) {
        over = true;
        say(live.dataset.changed, true);
        return;
      }
      for (const [pk, said] of Object.entries(answer.rows)) {
        show(pk, said);
      }
      say(live.dataset.fresh, false);
    }

    async function refresh() {
      if (asking || over) {
        return;
      }
      asking = true;
      asked = performance.now();
      try {
        await ask();
        failures = 0;
      } catch {
        failures += 1;
        say(live.dataset.stale, true);
      } finally {
        asking = false;
      }
    }

    function tick() {
      if (document.hidden || (detail && over)) {
        return;
      }
      const ended = count();
      const passed = (performance.now() - asked) / 1000;
      const pause = Math.min(LONGEST, every * 2 ** failures);
      if (passed >= pause || (ended && !failures && passed >= 2)) {
        refresh();
      }
    }

    say(live.dataset.fresh, false);
    live.hidden = false;
    setInterval(tick, 1000);
    document.addEventListener("visibilitychange", tick);
  }

  if (live) {
    start();
  }
}
