r"""Test that `\boxed{G}` is correct for every gold answer G, and no part of G is, except as the policy says."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from rlqwen_rewards import accuracy
from rlqwen_rewards.accuracy import Accuracy, grade

GOLDS = r"""
72
-72
0
007
1,234
1,234,567
12,345.67
1{,}234
1\,234
12\,345\,678
1{,}234{,}567
-1{,}234
3.14
-0.5
.75
72.0
1e-7
1e+22
3.5e8
6.02\times10^{23}
1.5 \cdot 10^{-3}
10^{-3}
10^6
2^{10}
\frac{1}{3}
-\frac{7}{12}
\dfrac13
1/3
-5/8
2\frac{2}{3}
2 2/3
-1\frac{1}{2}
3\tfrac{1}{4}
2½
¾
0.\overline{3}
0.1\overline{6}
50%
12.5\%
\frac{1}{2}\%
2\sqrt{3}
\sqrt{2}
\frac{\sqrt{3}}{2}
\sqrt[3]{2}
1+\sqrt{2}
\frac{1+\sqrt{5}}{2}
2\pi
\frac{\pi}{4}
e^{2}
\ln 2
\log_2 3
2+3i
\pm 2
1 \pm \sqrt{2}
x = \pm 3
x^2+1
x^{2}-2x+1
(x-1)(x+2)
\frac{x+1}{x-1}
3x
5m
2ab
n(n+1)/2
\binom{n}{2}
2^{n+1}-1
y = 2x + 3
x=5
x = \frac{3}{2}
f(x) = x^2 + 1
x=1 \text{ or } x=2
x=1, y=2
1, 2
1, 2, 3
1,2
-1 and 4
3 \text{ and } 5
2, 2
(1, 2)
(1,2,3)
(3,-4)
\left(\frac{1}{2}, 0\right)
(1,2), (3,4)
\{1,2\}
\left\{-1, 0, 1\right\}
\{100,200\}
[1,2)
(-\infty, 2)
(-\infty,2)\cup(3,\infty)
x \in [1,2]
x > 3
1 < x < 2
x \le -1 \text{ or } x \ge 4
\emptyset
\mathbb{R}
\infty
3:4
2:3:5
10-20
\begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}
\begin{bmatrix} \frac{1}{2} & 0 \\ 0 & x \end{bmatrix}
\frac{1}{2}\begin{pmatrix}1&2\\3&4\end{pmatrix}
A = \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{cases} x=1 \\ y=2 \end{cases}
\left\{\begin{array}{l} x = 1, \\ y = 2 \end{array}\right.
\begin{cases} x & x>0 \\ -x & \text{if } x \le 0 \end{cases}
f(x) = \begin{cases} x^2, & x \geq 0 \\ -x, & x < 0 \end{cases}
\begin{array}{cc}1&2\\3&4\end{array}
\left[\begin{array}{cc}1&2\\3&4\end{array}\right]
\begin{vmatrix}1&2\\3&4\end{vmatrix}
\frac{\pi}{2} + k\pi, k \in \mathbb{Z}
2\sqrt{3}\text{ cm}
2^{3}\text{ cm}
10^{-3}\text{ m}
5\text{ cm}^2
5\,\mathrm{m/s}
9.8 \text{ m/s}^2
12\sqrt{2}\ \text{cm}^{3}
3\pi \text{ square units}
\frac{3}{4}\text{ hour}
10 cm
72 clips
5 million
1.2 billion people
$10
\$1,234.56
US$20
€15
90^\circ
45°
30^{\circ}
120 degrees
25^\circ\text{C}
30^\circ 15'
2 hours 30 minutes
2\text{ hours }30\text{ minutes}
1 hour and 20 minutes
5 feet 3 inches
3 years, 2 months
March 5, 2020
5 March 2020
2020-03-05
3/5/2020
3:45
3:45 PM
May 2021
12_{5}
1010_2
A
B
(C)
B. 12
(B) 12
\text{(D)}
\textbf{(E)} 17
A, C
C: Paris
Paris
\text{Paris}
New York City
yes
No
True
\text{no solution}
\text{odd}
Monday
the Eiffel Tower
at least 3
The answer is $\boxed{12}$.
So the total is \boxed{72} clips.
48 + 24 = <<48+24=72>>72\n#### 72
She has $\frac{3}{4}$ of the cake, so the answer is \boxed{\frac{3}{4}}.
５７
－３
１，２３４
３．５
（１，２）
1、2
1或2
x=1或x=2
1 和 2
10元
３千米
5 千克
2小时30分
2小时30分钟
3米/秒
60千米/时
12平方厘米
25℃
百分之五十
50％
5万
1.2亿
2020年3月5日
3月5日
是
\text{是}
否
\text{不能}
正方形
选B
A、C
甲
答案是12。
3个
一定
\sin x
\int_0^1 x\,dx
\angle A = 60^\circ
\triangle ABC
\overline{AB}
|x|
\lfloor x \rfloor
a_n = 2n-1
3x + 2y = 7
I do not know
It depends on whether the function is continuous at zero.
Therefore, the answer is $\boxed{\frac{1}{2}}$.
5\sqrt{2}\text{ m}
2^{10}\text{ bytes}
3^2 \text{ cm}
10{,}000
1\,000
12{,}345.6
1 000 000
July 4, 1776
4/7/2020
1999年12月31日
January 1
1h 30m
3 days
2:30
1 hour, 30 minutes
1 hr 15 min
90 seconds
（B）
Ｂ
Ｂ．１２
B）
12，000
3.5 × 10^8
3.5×10⁸
１２．５％
x≥3
x＞3
¥１２
答：12
答案：12元
-2或3
(2，3)
｛1，2｝
【1，2】
3米50厘米
5元6角
1千米200米
60º
对
错
No solution
DNE
\text{undefined}
\text{A and B}
both A and B
0.5 or 1/2
10^{5}\,\mathrm{Pa}
6.02 \times 10^{23}\ \text{mol}^{-1}
9.8\,\text{m}\cdot\text{s}^{-2}
5\,\Omega
3\,\mu\text{m}
5\ \mathrm{k\Omega}
300\text{K}
\frac{1}{2}x + 3
x^2 + y^2 = 1
\frac{x^2}{4} + \frac{y^2}{9} = 1
2x+3y-5=0
\left(\begin{matrix}1\\2\end{matrix}\right)
\begin{pmatrix}1\\2\end{pmatrix}^T
\begin{pmatrix}1 & 2\cr 3 & 4\end{pmatrix}
\sqrt{2} \approx 1.414
x = 2, y = -1, z = 3
\frac{3}{4} \text{ or } 0.75
\$3.50
€ 3,50
seven
3 1/2 hours
2\frac12 hours
3\frac{1}{2}\text{ hours}
6:00 p.m.
noon
k \geq 3
All real numbers
None
3rd
21st century
A: 3, B: 4
(a,b)=(1,2)
(x, y) = (1, 2)
f(2) = 5
P(A) = \frac{1}{3}
3 \times 4
3 by 4
5!
10 to 20
10～20
\frac{1}{2} \text{ of the cake}
2 \text{ boys and } 3 \text{ girls}
5 apples and 3 oranges
\{x \mid x > 3\}
\{x | 1 < x < 2\}
\mathbb{R} \setminus \{0\}
x \neq 0
(-\infty, -1] \cup [2, \infty)
\left[-\frac{1}{2}, \frac{1}{2}\right]
(2n+1)\frac{\pi}{2}
n\pi \text{ for } n \in \mathbb{Z}
\frac{n!}{k!(n-k)!}
\frac{\partial f}{\partial x}
\vec{v} = (1,2)
2\mathbf{i} + 3\mathbf{j}
\langle 1, 2, 3 \rangle
\begin{aligned} x &= 1 \\ y &= 2 \end{aligned}
\text{Monday, March 5}
H_2O
\text{CO}_2
2H_2 + O_2 -> 2H_2O
C_6H_{12}O_6
\text{True, False}
A > B > C
$\frac{1}{2}$ or $0.5$
\frac{\sqrt{2}}{2}\text{ cm}^2
30^\circ, 60^\circ, 90^\circ
30°，60°，90°
II
IV
101_2
1:2:3
1 : 2
a:b
100^\circ F
-40^\circ\text{F}
5'10"
\frac{5}{6}\ \text{小时}
第3名
x^{2y}
x^2y
\dot{x}
y'
y'' + y = 0
\sum_{i=1}^n i^2
\lim_{x\to 0} \frac{\sin x}{x}
5x^2 - 3x + 2 \text{ cm}^2
\overrightarrow{AB}
≈3.14
约3.14
about 3.14
<5
>= 5
50-60%
10%-20%
5±2
""".strip().splitlines()

BY_POLICY = r"""
50% -> 50
12.5\% -> 12.5
\frac{1}{2}\% -> \frac{1}{2}
x=5 -> 5
x = \frac{3}{2} -> \frac{3}{2}
2\sqrt{3}\text{ cm} -> 2\sqrt{3}
2^{3}\text{ cm} -> 2^{3}
10^{-3}\text{ m} -> 10^{-3}
5\text{ cm}^2 -> 5
5\,\mathrm{m/s} -> 5
9.8 \text{ m/s}^2 -> 9.8
12\sqrt{2}\ \text{cm}^{3} -> 12\sqrt{2}
3\pi \text{ square units} -> 3\pi
\frac{3}{4}\text{ hour} -> \frac{3}{4}
10 cm -> 10
72 clips -> 72
$10 -> 10
US$20 -> 20
€15 -> 15
90^\circ -> 90
45° -> 45
30^{\circ} -> 30
120 degrees -> 120
25^\circ\text{C} -> 25
\angle A = 60^\circ -> 60
B. 12 -> 12
B. 12 -> B
(B) 12 -> (B)
(B) 12 -> 12
\textbf{(E)} 17 -> (E)
\textbf{(E)} 17 -> 17
C: Paris -> Paris
10元 -> 10
３千米 -> ３
5 千克 -> 5
3米/秒 -> 3
60千米/时 -> 60
12平方厘米 -> 12
25℃ -> 25
50％ -> 50
3个 -> 3
\{x \mid x > 3\} -> x > 3
3 days -> 3
90 seconds -> 90
Ｂ．１２ -> １２
¥１２ -> １２
60º -> 60
9.8\,\text{m}\cdot\text{s}^{-2} -> 9.8
5\ \mathrm{k\Omega} -> 5
300\text{K} -> 300
\sqrt{2} \approx 1.414 -> \sqrt{2}
\$3.50 -> 3.50
(a,b)=(1,2) -> (1,2)
(x, y) = (1, 2) -> (1, 2)
f(2) = 5 -> 5
P(A) = \frac{1}{3} -> \frac{1}{3}
\frac{1}{2} \text{ of the cake} -> \frac{1}{2}
\vec{v} = (1,2) -> (1,2)
100^\circ F -> 100
\frac{5}{6}\ \text{小时} -> \frac{5}{6}
f(x) = x^2 + 1 -> x^2 + 1
y = 2x + 3 -> 2x + 3
"""
r"""Parts that are correct by the policy: a number without its unit, a value without its name, a choice or its content."""

SAME_TEXT = re.compile(
    r"\\boxed|####|^\\text\{[^{}\d]*\}$|答|\\left"
)  # the part is the whole content of the gold answer

MORE_PARTS = r"""
1,234 -> 34
1{,}234 -> 234
1\,234 -> 234
2\sqrt{3}\text{ cm} -> 2\text{ cm}
2\sqrt{3}\text{ cm} -> \sqrt{3}\text{ cm}
2^{3}\text{ cm} -> 2\text{ cm}
10^{-3}\text{ m} -> 10\text{ m}
12\sqrt{2}\ \text{cm}^{3} -> 12\text{ cm}^3
2\frac{2}{3} -> \frac{2}{3}
2 2/3 -> 2/3
5m -> m
x=1 \text{ or } x=2 -> x=1
x=1, y=2 -> x=1
2, 2 -> 2
(1,2), (3,4) -> (1,2)
(-\infty,2)\cup(3,\infty) -> (-\infty,2)
1 < x < 2 -> x < 2
\pm 2 -> -2
\begin{pmatrix}1&2\\3&4\end{pmatrix} -> \begin{pmatrix}3&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} -> 3, 4
\begin{cases} x=1 \\ y=2 \end{cases} -> y=2
\frac{1}{2}\begin{pmatrix}1&2\\3&4\end{pmatrix} -> \begin{pmatrix}1&2\\3&4\end{pmatrix}
f(x) = \begin{cases} x^2, & x \geq 0 \\ -x, & x < 0 \end{cases} -> x^2
2 hours 30 minutes -> 2 hours
2 hours 30 minutes -> 30 minutes
2 hours 30 minutes -> 2.5
5 feet 3 inches -> 5 feet
3 years, 2 months -> 3 years
30^\circ 15' -> 30^\circ
March 5, 2020 -> March 5
March 5, 2020 -> March
2020年3月5日 -> 2020年
2020年3月5日 -> 3月5日
3:45 PM -> 3:45
2小时30分 -> 2小时
x=1或x=2 -> x=1
5 million -> 5
5万 -> 5
1.2亿 -> 1.2
A, C -> A
A、C -> A
at least 3 -> 3
2020-03-05 -> 2012
10-20 -> -10
12_{5} -> 12
"""

_PART = re.compile(
    r"\d+(?:\.\d+)?|\\frac\{[^{}]*\}\{[^{}]*\}|\\sqrt\{[^{}]*\}|[A-Za-z一-鿿]{2,}|\([^()]*\)|[a-z]\s*[=<>]\s*-?\d+"
)


SAME = r"""
12 -> 12 m
12 -> 12m
18 -> 18 \text{ dollars every day at the farmers' market}
20 -> 20\ \text{students}\ .
40 -> 40 \text{ years old}
18 -> \text{Total} = 18
-5 -> -\$5
x+y=7 -> y+x=7
x+y=7 -> x=7-y
19+67=86 -> 86
86 -> 19+67=86
y''+y=0 -> y+y''=0
f'(x)=2x -> 2x
1h 30m -> 90 minutes
25^\circ\text{C} -> 25℃
25^\circ\text{C} -> 25
2\mathbf{i} + 3\mathbf{j} -> 3\mathbf{j}+2\mathbf{i}
B -> \mathbf{B}
B -> \mathbf{(B)}
72 -> \mathbf{72}
B -> \text{(B) } 12
x^2+y^2=1 -> y^2+x^2=1
x=2y -> 2y
1234 -> 1{,}234
1234 -> 1\,234
1234 -> 1,\!234
1234 -> 1 234
1234567 -> 1{,}234{,}567
72 -> ７２
-3 -> －3
-3 -> −3
0.5 -> .5
1/2 -> \frac12
1/2 -> ½
1/2 -> 50\%
86 -> 86.00
86 -> x=86
86 -> 19+67=86
72 -> 72元
72 -> $72
72 -> \$72
72 -> \text{72 clips}
72 -> 72\text{ clips}
72 -> 72~\text{clips}
72 -> \text{\$72}
3千米 -> 3公里
3千米 -> 3 km
3千米 -> 3000米
3千米 -> 3\text{ km}
3千米 -> ３千米
10元 -> 10
10元 -> 10 元
10元 -> ¥10
10 -> ￥10
是 -> \text{是}
\text{是} -> 是
1或2 -> 1, 2
1、2 -> 2, 1
1、2 -> \{1,2\}
x=1或x=2 -> 1,2
x=1或x=2 -> x_1=1, x_2=2
90 -> 90°
90° -> 90^{\circ}
90^\circ -> 90\text{ degrees}
90度 -> 90^\circ
25^\circ C -> 25℃
1e-7 -> 0.0000001
1e-07 -> 10^{-7}
1e-7 -> 1 \times 10^{-7}
3.5e8 -> 350000000
3.5\times10^8 -> 3.5e8
3.5e8 -> 3.5 \cdot 10^{8}
0.1 -> \frac{1}{10}
0.30000000000000004 -> 0.3
B -> B. 12
B -> (B)
(B) -> B
(B) -> B.
B -> \text{B}
B -> \textbf{(B)} 12
B -> \mathrm{B}
B -> (B) $12$
B. 12 -> B
B. 12 -> 12
B. 12 -> (B)\ 12
B -> 选B
B -> Option B
B -> b
A, C -> AC
AC -> A、C
2 2/3 -> \frac{8}{3}
2 2/3 -> 2\frac{2}{3}
8/3 -> 2 2/3
8/3 -> 2\ 2/3
8/3 -> 2\tfrac23
2\sqrt{3} -> \sqrt{12}
2\sqrt{3} -> 2√3
2\sqrt{3}\text{ cm} -> 2\sqrt3
2\sqrt{3} -> 2\sqrt{3}\text{ cm}
x^2+1 -> 1+x^2
(x-1)(x+2) -> x^2+x-2
(1,2) -> \left(1, 2\right)
(1,2) -> (1.0, 2)
(1,2) -> 1, 2
\{1,2\} -> 2, 1
[1,2) -> \left[1, 2\right)
(3,\infty) -> x>3
x>3 -> (3,\infty)
x > 3 -> 3 < x
\begin{pmatrix}1&2\\3&4\end{pmatrix} -> \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}1/2\\3\end{pmatrix} -> \left(\begin{array}{c} 0.5 \\ 3 \end{array}\right)
\begin{pmatrix}1&2\\3&4\end{pmatrix} -> \left[\begin{matrix}1&2\\3&4\end{matrix}\right]
A = \begin{pmatrix}1&2\\3&4\end{pmatrix} -> \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{cases} x=1 \\ y=2 \end{cases} -> x=1, y=2
\begin{cases} x=1 \\ y=2 \end{cases} -> \begin{cases} y=2 \\ x=1 \end{cases}
\begin{cases} x=1 \\ y=2 \end{cases} -> \left\{\begin{array}{l} x = 1 \\ y = 2 \end{array}\right.
\begin{cases} x & x>0 \\ -x & \text{if } x \le 0 \end{cases} -> \begin{cases} x, & \text{if } x > 0, \\ -x, & \text{if } x \leq 0. \end{cases}
2 hours 30 minutes -> 2\text{ hours and }30\text{ minutes}
2 hours 30 minutes -> 150\text{ min}
2小时30分 -> 2 hours 30 minutes
March 5, 2020 -> 2020年3月5日
3:45 PM -> 3:45 p.m.
3:45 PM -> 15:45
5 feet 3 inches -> 63 inches
5 million -> 5,000,000
5万 -> 50000
50000 -> 5万
1.2亿 -> 120000000
Paris -> \text{paris}
Paris -> Paris.
Paris -> **Paris**
no solution -> \text{No solution}
\infty -> infinity
\emptyset -> \varnothing
60 km/h -> 60\text{ km/h}
60 km/h -> 60千米/时
60 km/h -> 60 kilometers per hour
60 mph -> 60 \text{ miles per hour}
5 m/s -> 5\text{ m/s}
9.8 m/s^2 -> 9.8\text{ m/s}^2
12\text{ cm}^2 -> 12\text{ square centimeters}
12\text{ cm}^2 -> 12 cm²
12 平方厘米 -> 12\text{ cm}^2
5 m -> 5\text{ m}
100 -> 100\%
50\% -> 50 percent
0.333333 -> 1/3
\frac{\pi}{2} -> \pi/2
\frac{\pi}{2} -> 0.5\pi
e^2 -> \mathrm{e}^2
\frac{1}{x} -> 1/x
x=5 -> 5
5 -> x = 5
5 -> y=5
\frac{1}{3} -> \frac{1}{3} \approx 0.333
3.14 -> \pi \approx 3.14
y = 2x+3 -> y = 3 + 2x
y=2x+3 -> 2x-y+3=0
\log_2 3 -> \frac{\ln 3}{\ln 2}
12 -> 12 \text{ (apples)}
-5 -> -5
10-20 -> 10–20
3:4 -> 3 : 4
3:4 -> \frac{3}{4}
1,234.5 -> 1234.5
100,000 -> 100000
0 -> -0
\sqrt{2}/2 -> \frac{\sqrt{2}}{2}
n(n+1)/2 -> \frac{n(n+1)}{2}
\pm 2 -> 2, -2
2,-2 -> \pm 2
x = \pm 3 -> x = 3 \text{ or } x = -3
k\pi, k\in\mathbb{Z} -> k\pi, k \in \mathbb{Z}
0.\overline{3} -> 1/3
-\frac{1}{2} -> \frac{-1}{2}
-\frac{1}{2} -> -0.5
\frac{1}{2} -> \frac{2}{4}
\{x \mid x > 3\} -> x>3
\{x \mid x > 3\} -> (3,\infty)
(x, y) = (1, 2) -> (1,2)
(1,2) -> \left(x,y\right)=\left(1,2\right)
x=1,y=2 -> (x,y)=(1,2)
[1,2] -> 1 \le x \le 2
x\in\{1,2\} -> 1,2
1,2 -> x \in \{1, 2\}
2 \text{ boys and } 3 \text{ girls} -> 2 boys, 3 girls
5 -> five
5 -> 五
18 -> \$18.00
18 -> \$18\text{ dollars}
72 -> \textcolor{red}{72}
72 -> \underline{72}
72 -> 72\text{.}
72 -> 72\text{ (clips)}
11:30 -> 11:30 AM
2^{10} -> 1024
19+67 -> 86
1,000,000 -> 10^6
"""

DIFFERENT = r"""
10 -> 10 or more
10 -> \ge 10
72 -> 72x
12 -> 12 more people
x+y=7 -> 7
y' -> y
y''+y=0 -> 0
f'(x)=2x -> f(x)=2x
1h 30m -> h 30m
A: 3, B: 4 -> A
25^\circ\text{C} -> 25\text{ F}
2\mathbf{i} + 3\mathbf{j} -> 2\mathbf{i} + 3
a=b=3 -> 3
x^2+y^2=1 -> 1
2y=0 -> 0
5 -> x=5=y
1024 -> 2^{10}
16 -> 4^2
7 -> 7\text{ apples and }3\text{ pears}
1/3 -> 33.33\%
86 -> 19 + 67
86 -> 67+19
86 -> 2 \times 43
86 -> 43\cdot 2
86 -> \frac{172}{2}
86 -> 172/2
86 -> 172 \div 2
86 -> 100-14
24 -> 4!
5 -> \sqrt{25}
5 -> \sqrt{9+16}
10 -> \binom{5}{2}
72 -> 1 = 2 = 72
72 -> 71 = 72
72 -> 71 \text{ or } 72
72 -> 71或72
72 -> 71、72
72 -> 71; 72
72 -> 71/72
72 -> 71|72
72 -> 71 \\ 72
72 -> 71, 72
72 -> \{71, 72\}
72 -> 72 or 73
72 -> 70-72
72 -> 70 - 72
72 -> 71 \approx 72
72 -> 72 \pm 1
72 -> \pm 72
72 -> 72x
72 -> x=71=72
72 -> 72!
72 -> 5 million
72 -> 72 million
72 -> 72万
72 -> 72\%\%
72 -> 720
72 -> 72^\circ 30'
5 -> 5 million
10 cm -> 10 m
10 cm -> 10 kg
10 cm -> 10\text{ m}
10 元 -> 10 角
B -> A
B -> A. 12
B -> A or B
B -> A, B
B -> 12
B. 12 -> C. 12
B. 12 -> B. 13
A, C -> A
AC -> A
Paris -> pairs
(1,2) -> (2,1)
(1,2) -> [1,2]
[1,2) -> [1,2]
1, 2 -> 1
1, 2 -> 1, 2, 3
x=5 -> y=5
x>3 -> x<3
x>3 -> x\ge 3
0.5 -> 50
1.5 -> 1,5
1/3 -> 0.33
1e-10 -> 0
1e-10 -> 2e-10
3.5e8 -> 3.5
2\pi -> 2
x^2 -> 2x
是 -> 否
yes -> no
12_5 -> 12
12_5 -> 12_6
2020-03-05 -> 2012
March 5, 2020 -> March 6, 2020
y = 2x+3 -> y=2x+4
\begin{pmatrix}1&2\\3&4\end{pmatrix} -> 4
\begin{pmatrix}1&2\\3&4\end{pmatrix} -> \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} -> \begin{pmatrix}1&2\end{pmatrix}
"""


def pairs(table: str) -> list[tuple[Any, ...]]:
    return [tuple(cell.strip() for cell in line.split(" -> ")) for line in table.strip().splitlines()]


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_answer_is_correct_and_its_parts_are_not(gold: Any) -> None:
    gold = gold.replace(r"\n#", "\n#")
    assert grade(boxed(gold), gold) == 1.0
    parts = {part for part in _PART.findall(gold) if part != gold and not SAME_TEXT.search(gold)}
    parts -= {part for whole, part in pairs(BY_POLICY) if whole == gold}
    assert [part for part in sorted(parts) if grade(boxed(part), gold) == 1.0] == []


@pytest.mark.parametrize(("gold", "part"), pairs(BY_POLICY))
def test_some_parts_are_correct_by_the_policy(gold: Any, part: str) -> None:
    assert grade(boxed(part), gold) == 1.0


@pytest.mark.parametrize(("gold", "part"), pairs(MORE_PARTS))
def test_larger_parts_are_wrong(gold: Any, part: str) -> None:
    assert grade(boxed(gold), gold) == 1.0
    assert grade(boxed(part), gold) != 1.0


def policy_examples() -> Iterator[Any]:
    for line in accuracy.__doc__.splitlines():
        if line.startswith("| `"):
            gold, right, wrong = (re.findall("`([^`]*)`", cell) for cell in line.strip("|").split(" | "))
            yield from ((gold[0], answer, 1.0) for answer in right)
            yield from ((gold[0], answer, 0.0) for answer in wrong)


@pytest.mark.parametrize(("gold", "answer", "reward"), list(policy_examples()))
def test_the_examples_of_the_policy_hold(gold: Any, answer: str, reward: float | None) -> None:
    assert grade(boxed(answer), gold) == reward


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME))
def test_equal_answers_in_other_notation_are_correct(gold: Any, answer: str) -> None:
    assert grade(boxed(answer), gold) == 1.0


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_different_answers_are_wrong(gold: Any, answer: str) -> None:
    assert grade(boxed(answer), gold) == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        (72, "72", 1.0), (72.0, "72", 1.0), (0.1, r"\frac{1}{10}", 1.0), (1e-07, "10^{-7}", 1.0), (1e22, "10^{22}", 1.0),
        (0.1 + 0.2, "0.3", 1.0), (-3, "-3", 1.0), (72, "73", 0.0), (True, r"\text{True}", 1.0), (float("inf"), r"\infty", 1.0),
        (Fraction(1, 3), "1/3", 1.0),
    ],
)  # fmt: skip
def test_gold_answers_may_be_numbers(gold: Any, answer: str, reward: float) -> None:
    assert grade(boxed(answer), gold) == reward


@pytest.mark.parametrize("gold", [None, float("nan"), "", "  ", "nan", [], [None], "I do not know", r"\frac{1}{"])
def test_a_missing_or_unreadable_gold_answer_gives_none(gold: Any) -> None:
    texts = [r"\boxed{2}", r"\boxed{None}", r"\boxed{nan}", "no answer", "<think>never closed"]
    assert Accuracy()(texts, solution=[gold] * 5) == [None] * 5


def test_a_missing_gold_answer_among_several_is_ignored() -> None:
    assert grade(r"\boxed{2}", [None, "2"]) == 1.0
    assert grade(r"\boxed{3}", [None, "2"]) == 0.0
