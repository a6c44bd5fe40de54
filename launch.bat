@echo off
rem Double-click on Windows: sets LoRA Easel up on the first start, then opens its window.
cd /d "%~dp0"
for %%v in (3.13 3.12 3.11) do (
    py -%%v -c "" >nul 2>nul && (
        py -%%v launch.py %*
        exit /b
    )
)
python -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" >nul 2>nul && (
    python launch.py %*
    exit /b
)
rem uv fetches a Python of its own.
where uv >nul 2>nul && (
    uv run --no-project --python 3.13 launch.py %*
    exit /b
)
echo LoRA Easel needs Python 3.11, 3.12 or 3.13: install it from python.org and start this again.
pause
exit /b 1
